//! What a rank needs in memory, worked out from the model's configuration and the recipe alone, before anything is
//! fetched. The parts are those of the step ([`crate::step`]): what is there all the time, and the most that any of
//! its phases adds. `vicuna-memory-bench` measures what came of it.

pub mod agreement;
pub mod command;
pub mod limits;
pub mod remedies;

use crate::batch::LENGTH_STEP;
use crate::blocks::{BlockTable, EMBEDDING_GROUP};
use limits::Limits;
use std::fmt;
use vicuna_model::Config;
use vicuna_model::layers::Projection;
use vicuna_protocol::gigabytes;
use vicuna_protocol::job::{Base, Method, Parameters, Precision, Recipe, Recompute};

/// Bytes of code, libraries, small change and a tokenizer of 50,000 tokens on the host.
const PROGRAM: u64 = 160 << 20;
/// Bytes that CUDA's context, its libraries' workspaces and the allocator's rounding take of a device.
const CUDA_CONTEXT: u64 = 900 << 20;
/// Bytes of the context's host side, libraries' code not counted.
const CUDA_HOST: u64 = 3 << 29;
/// Rows of logits at a time (`vicuna_model::layers::cross_entropy_sum`).
const LOSS_ROWS: u64 = 512;

/// Group of a layer; they are alike.
const LAYER: usize = EMBEDDING_GROUP + 1;

/// Bytes of conversations in files for a byte of a compressed one.
const UNPACKED: u64 = 3;
/// Bytes of conversations in files for a byte that preparing and training hold of them: sequences are on disk, and where
/// each is, its place in the order and what cleaning remembers of it are not.
const KEPT_OF: u64 = 4;

/// About as many bytes as a rank holds of data in these files, which have names and bytes.
pub fn data_bytes(files: &[(String, u64)]) -> u64 {
    let unpacked = |(name, bytes): &(String, u64)| match name.to_ascii_lowercase().ends_with(".parquet") {
        true => bytes * UNPACKED,
        false => *bytes,
    };
    files.iter().map(unpacked).sum::<u64>() / KEPT_OF
}

/// What decides how much a rank needs.
#[derive(Clone, Debug)]
pub struct Workload<'a> {
    pub config: &'a Config,
    /// Of what is trained.
    pub table: &'a BlockTable,
    pub recipe: &'a Recipe,
    /// The model computes on a GPU: weights and activations are there, masters and moments on the host.
    pub gpu: bool,
    /// Bytes that every rank holds of the prepared sequences on the host.
    pub data: u64,
    /// Checkpoints may take longer than a step to write.
    pub slow_store: bool,
}

/// Bytes that one rank needs at its peak.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    pub ranks: u32,
    /// A rank has the weights of its blocks alone.
    pub sharded: bool,
    pub host: u64,
    /// 0 without a GPU.
    pub device: u64,
    /// What they consist of, largest first.
    pub parts: Vec<Part>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub what: &'static str,
    pub on_device: bool,
    pub bytes: u64,
}

fn host(what: &'static str, bytes: u64) -> Part {
    Part { what, on_device: false, bytes }
}

impl Need {
    pub fn fits(&self, limits: Limits) -> bool {
        let within = |bytes: u64, limit: Option<u64>| limit.is_none_or(|limit| bytes <= limit);
        within(self.host, limits.host) && within(self.device, limits.device)
    }
}

impl Workload<'_> {
    /// What each of `ranks` ranks needs where the recipe leaves it to what there is: replicated weights if they fit.
    pub fn need_within(&self, ranks: u32, limits: Limits) -> Need {
        let replicated = match self.recipe.parameters {
            Parameters::Sharded => None,
            Parameters::Replicated => Some(self.need(ranks, false)),
            Parameters::Auto => Some(self.need(ranks, false)).filter(|need| need.fits(limits)),
        };
        replicated.unwrap_or_else(|| self.need(ranks, true))
    }

    /// What each of `ranks` ranks needs: at least, or with all layers kept for the way back where the recipe says so.
    pub fn need(&self, ranks: u32, sharded: bool) -> Need {
        let phases = self.phases(ranks, sharded);
        let bytes =
            |parts: &[Part], on_device| parts.iter().filter(|it| it.on_device == on_device).map(|it| it.bytes).sum();
        let mut parts = self.standing(ranks, sharded);
        for on_device in [false, true] {
            let largest = phases.iter().max_by_key(|phase| -> u64 { bytes(phase, on_device) });
            parts.extend(largest.into_iter().flatten().filter(|part| part.on_device == on_device));
        }
        let (training, device): (u64, u64) = (bytes(&parts, false), bytes(&parts, true));
        let loading = self.loading(ranks, sharded);
        if loading > training {
            parts.push(host("reading the model", loading - training));
        }
        parts.retain(|part| part.bytes > 0);
        parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
        Need { ranks, sharded, host: training.max(loading), device, parts }
    }

    /// What is there in every phase.
    fn standing(&self, ranks: u32, sharded: bool) -> Vec<Part> {
        let trained = if sharded { 0 } else { self.compute_bytes() * self.trained_elements() };
        let checkpoint = if self.slow_store { self.checkpoint(ranks) } else { 0 };
        vec![
            self.computed("weights", self.frozen() + trained),
            host("masters and moments", self.state(ranks)),
            host("a checkpoint on its way", checkpoint),
            host("program", PROGRAM + if self.gpu { CUDA_HOST } else { 0 }),
            host("prepared data", self.data),
            Part { what: "CUDA", on_device: true, bytes: if self.gpu { CUDA_CONTEXT } else { 0 } },
        ]
    }

    /// What each phase of a step, and of what comes between steps, adds.
    fn phases(&self, ranks: u32, sharded: bool) -> Vec<Vec<Part>> {
        let layer = self.trained_elements_of(LAYER);
        let largest = self.trained_elements_of(EMBEDDING_GROUP).max(self.trained_elements_of(self.table.head_group()));
        let gathered = if sharded { largest + layer } else { 0 };
        vec![
            self.at_the_head(ranks, sharded),
            self.at_a_layer(ranks, sharded),
            self.at_the_embedding(ranks),
            vec![host("messages", self.messages(ranks, sharded))],
            vec![host("a checkpoint", if self.slow_store { 0 } else { self.checkpoint(ranks) })],
            // A group of tensors and the next one; and a tensor as it is read again for its digest: its bytes, itself, both in fp32.
            vec![host("the result", self.compute_bytes() * gathered + 12 * largest)],
        ]
    }

    fn at_the_head(&self, ranks: u32, sharded: bool) -> Vec<Part> {
        let mut parts = self.kept(ranks, sharded);
        parts.push(self.gathered(sharded, self.top_elements() + self.trained_elements_of(LAYER)));
        parts.push(self.computed("the head at work", self.head_work(ranks)));
        parts
    }

    fn at_a_layer(&self, ranks: u32, sharded: bool) -> Vec<Part> {
        let mut parts = self.kept(ranks, sharded);
        parts.push(self.gathered(sharded, 2 * self.trained_elements_of(LAYER)));
        parts.push(self.computed("a layer at work", self.layer_work(ranks)));
        parts.push(Self::sent(self.top_elements()));
        parts
    }

    /// All other gradients are finished by then.
    fn at_the_embedding(&self, ranks: u32) -> Vec<Part> {
        let embedding = self.trained_elements_of(EMBEDDING_GROUP);
        vec![
            host("gradients", 4 * self.kept_elements(ranks)),
            self.computed("the embedding at work", self.sums(ranks, embedding)),
            Self::sent(embedding),
        ]
    }

    /// Sharded, a phase has its own weights and those of the next.
    fn gathered(&self, sharded: bool, elements: u64) -> Part {
        self.computed("weights at work", if sharded { self.compute_bytes() * elements } else { 0 })
    }

    /// A group's sums as they go to owners, and those of others that come to this rank.
    fn sent(elements: u64) -> Part {
        host("sums on their way", 4 * elements)
    }

    /// What the way forward leaves for the way back.
    fn kept(&self, ranks: u32, sharded: bool) -> Vec<Part> {
        let one = self.tokens() * self.config.hidden as u64 * self.compute_bytes() * self.micro_batches(ranks);
        let (whole, inputs) = match self.keeps_whole() {
            true => (self.kept_whole(ranks, sharded), 0),
            false => (0, one * self.config.layers as u64),
        };
        vec![
            self.computed("layers that are kept", whole),
            Part { what: "inputs of layers", on_device: self.gpu && !self.recipe.offload, bytes: inputs },
            // Of the layer at work, and what comes from above.
            self.computed("hidden states", 2 * one),
        ]
    }

    /// Bytes of one layer's run that is kept from the way forward to the way back, for one token
    /// (`vicuna_model::gradients::LayerRun`): the inputs of every operation whose gradient needs them.
    pub fn run_bytes_a_token(&self) -> u64 {
        let config = self.config;
        let [hidden, intermediate] = [config.hidden, config.intermediate].map(|size| size as u64);
        let attended = (config.heads * config.head_dim) as u64;
        // Both norms: input, normalised, result; queries, keys, values, mixed; gate, its SiLU, up, their product.
        let elements = 6 * hidden + hidden + 4 * attended + 4 * intermediate;
        let adapters = match self.recipe.method.lora() {
            None => 0,
            // What a projection made before the adapter's part is added, and the inputs that were not dropped.
            Some(_) => 2 * (hidden + attended) + 3 * intermediate,
        };
        // What attention made of each sequence, before it is one row.
        let packed = if self.recipe.packing { attended } else { 0 };
        (elements + adapters + packed) * self.compute_bytes()
    }

    /// Bytes that keeping all layers of all micro-batches takes.
    pub fn kept_whole(&self, ranks: u32, sharded: bool) -> u64 {
        let runs = self.run_bytes_a_token() * self.tokens() * self.micro_batches(ranks);
        (runs + self.run_bytes_a_layer(sharded)) * self.config.layers as u64
    }

    /// Bytes of a kept layer's weights, which nobody would hold otherwise.
    pub fn run_bytes_a_layer(&self, sharded: bool) -> u64 {
        if sharded { self.compute_bytes() * self.trained_elements_of(LAYER) } else { 0 }
    }

    /// Tokens of a full micro-batch.
    pub fn tokens(&self) -> u64 {
        let length = u64::from(self.recipe.max_length).next_multiple_of(LENGTH_STEP as u64);
        u64::from(self.recipe.micro_batch) * length
    }

    /// Micro-batches of a step that a rank runs, at most, while all are equally fast.
    fn micro_batches(&self, ranks: u32) -> u64 {
        u64::from(self.recipe.global_batch.div_ceil(self.recipe.micro_batch.max(1)).div_ceil(ranks.max(1)))
    }

    /// A quantised base's layers are run again all the same.
    fn keeps_whole(&self) -> bool {
        self.recipe.recompute == Recompute::Never && !matches!(self.recipe.method, Method::QLoRA(..))
    }

    fn computed(&self, what: &'static str, bytes: u64) -> Part {
        Part { what, on_device: self.gpu, bytes }
    }

    /// Bytes of a number that passes compute with.
    fn compute_bytes(&self) -> u64 {
        match self.recipe.precision {
            Precision::Fp32 => 4,
            Precision::Bf16 => 2,
        }
    }

    fn model_elements(&self) -> u64 {
        self.config.parameter_count() as u64
    }

    fn trained_elements(&self) -> u64 {
        self.table.elements() as u64
    }

    fn trained_elements_of(&self, group: usize) -> u64 {
        self.table.group_blocks(group).map(|block| self.table.blocks[block].elements as u64).sum()
    }

    /// What the head is computed with.
    fn top_elements(&self) -> u64 {
        let tied = if self.config.tie_word_embeddings { self.trained_elements_of(EMBEDDING_GROUP) } else { 0 };
        self.trained_elements_of(self.table.head_group()) + tied
    }

    fn layer_elements(&self) -> u64 {
        let of = |projection: Projection| projection.size(self.config);
        let elements = Projection::ALL.into_iter().map(of).map(|(rows, columns)| (rows * columns) as u64);
        elements.sum::<u64>() + 2 * self.config.hidden as u64
    }

    fn vocabulary_elements(&self) -> u64 {
        (self.config.vocab * self.config.hidden) as u64
    }

    /// Elements of which a rank keeps masters and moments, as owner or twin.
    fn kept_elements(&self, ranks: u32) -> u64 {
        let copies = u64::from(ranks.clamp(1, 2));
        (self.trained_elements() * copies).div_ceil(u64::from(ranks.max(1)))
    }

    /// The base of adapters.
    fn frozen(&self) -> u64 {
        let compute = self.compute_bytes();
        let projections = self.layer_elements() * self.config.layers as u64;
        let rest = self.model_elements().saturating_sub(projections);
        match &self.recipe.method {
            Method::Full => 0,
            Method::LoRA(_) => compute * self.model_elements(),
            Method::QLoRA(_, base) => {
                let held = match base {
                    // Half a byte, and a scale of four for 64 values.
                    Base::Nf4 => projections * 9 / 16,
                    Base::Int8 => projections,
                };
                // One layer at a time is there in full.
                held + compute * (rest + self.layer_elements())
            }
        }
    }

    /// Sums that wait in the tree: one for each of its levels, and what is being added.
    fn sums(&self, ranks: u32, elements: u64) -> u64 {
        let levels = u64::from(u64::BITS - self.micro_batches(ranks).leading_zeros());
        4 * elements * levels.max(1)
    }

    fn layer_work(&self, ranks: u32) -> u64 {
        let [hidden, intermediate] = [self.config.hidden, self.config.intermediate].map(|size| size as u64);
        let passing = self.tokens() * (2 * hidden + 3 * intermediate) * self.compute_bytes();
        let run = self.tokens() * self.run_bytes_a_token();
        match self.recipe.method {
            Method::Full => {
                let gradients = self.compute_bytes() * self.layer_elements();
                run + passing + gradients + self.sums(ranks, self.layer_elements())
            }
            // Their gradients are small.
            Method::LoRA(_) | Method::QLoRA(..) => run + passing,
        }
    }

    fn head_work(&self, ranks: u32) -> u64 {
        let vocabulary = self.vocabulary_elements();
        let rows = self.tokens().min(LOSS_ROWS);
        let compute = self.compute_bytes();
        // Logits, their fp32 copy where they are not, the logarithms, and gradients of all of these.
        let copies = if compute == 4 { 0 } else { compute + 4 };
        let logits = rows * self.config.vocab as u64 * (4 + 4 + 4 + copies);
        // The gradients of one piece are added to those of the pieces before.
        let pieces = if self.tokens() > LOSS_ROWS { compute * vocabulary } else { 0 };
        match self.recipe.method {
            Method::Full => logits + pieces + self.sums(ranks, vocabulary),
            Method::LoRA(_) | Method::QLoRA(..) => logits,
        }
    }

    fn state(&self, ranks: u32) -> u64 {
        12 * self.kept_elements(ranks)
    }

    /// Weights of blocks that are kept elsewhere, as they come in: after a step, when its gradients are gone, or, sharded, of
    /// the next two groups.
    fn messages(&self, ranks: u32, sharded: bool) -> u64 {
        let elsewhere = self.trained_elements() - self.kept_elements(ranks).min(self.trained_elements());
        let largest = self.trained_elements_of(EMBEDDING_GROUP).max(self.trained_elements_of(LAYER));
        self.compute_bytes() * if sharded { elsewhere.min(2 * largest) } else { elsewhere }
    }

    /// A copy of the owned blocks.
    fn checkpoint(&self, ranks: u32) -> u64 {
        12 * self.trained_elements().div_ceil(u64::from(ranks.max(1)))
    }

    /// The host's peak while the model is read, one tensor after another: what is made of it, and the largest tensor in fp32
    /// and as it is stored, which mostly is in 16 bits.
    fn loading(&self, ranks: u32, sharded: bool) -> u64 {
        let computed = match self.gpu {
            true => CUDA_HOST,
            false => self.frozen() + if sharded { 0 } else { self.compute_bytes() * self.trained_elements() },
        };
        PROGRAM + 6 * self.vocabulary_elements() + computed + self.state(ranks) + self.data
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on the host", gigabytes(self.host))?;
        if self.device > 0 {
            write!(f, " and {} on the device", gigabytes(self.device))?;
        }
        let parts = self.parts.iter().take(3).map(|part| format!("{} {}", part.what, gigabytes(part.bytes)));
        write!(f, " ({})", parts.collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vicuna_model::tiny;
    use vicuna_protocol::job::{Lora, Reproducibility, RunLength, Schedule};

    pub fn recipe(method: Method, precision: Precision) -> Recipe {
        Recipe {
            method,
            global_batch: 16,
            micro_batch: 1,
            length: RunLength::Epochs(1),
            learning_rate: 2e-5,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.03,
            weight_decay: 0.0,
            gradient_clip: 1.0,
            max_length: 2048,
            seed: 0,
            evaluate_every: None,
            precision,
            recompute: Recompute::Auto,
            parameters: Parameters::Auto,
            offload: false,
            packing: false,
            rope_scaling: None,
            reproducibility: Reproducibility::default(),
        }
    }

    fn need(config: &Config, method: Method, ranks: u32) -> Need {
        let lora = crate::adapters::lora(&method).unwrap();
        let table = BlockTable::of(config, lora.as_ref());
        let recipe = recipe(method, Precision::Bf16);
        Workload { config, table: &table, recipe: &recipe, gpu: true, data: 0, slow_store: true }.need(ranks, false)
    }

    #[test]
    fn the_data_are_on_the_host_of_every_rank() {
        let (config, table) = (tiny::config(), BlockTable::new(&tiny::config()));
        let recipe = recipe(Method::Full, Precision::Fp32);
        let need = |data| {
            Workload { config: &config, table: &table, recipe: &recipe, gpu: true, data, slow_store: true }
                .need(4, false)
        };
        let (without, with) = (need(0), need(5 << 30));
        assert_eq!((with.host, with.device), (without.host + (5 << 30), without.device));
    }

    #[test]
    fn what_is_never_computed_again_is_kept_unless_the_base_is_quantised() {
        let config = tiny::llama_7b();
        let lora = || Lora { rank: 8, alpha: 16.0, dropout: 0.0, targets: vec!["all-linear".to_owned()] };
        let grows = |method: Method| {
            let settings = crate::adapters::lora(&method).unwrap();
            let table = BlockTable::of(&config, settings.as_ref());
            let device = |recompute| {
                let recipe = Recipe { recompute, ..recipe(method.clone(), Precision::Bf16) };
                Workload { config: &config, table: &table, recipe: &recipe, gpu: true, data: 0, slow_store: true }
                    .need(2, false)
                    .device
            };
            device(Recompute::Never) - device(Recompute::Always)
        };
        // 8 micro-batches of 2048 tokens through 32 layers: 0.14 MB a token and layer.
        assert!(grows(Method::Full) > 70_000_000_000, "{}", grows(Method::Full));
        assert!(grows(Method::LoRA(lora())) > grows(Method::Full));
        assert_eq!(grows(Method::QLoRA(lora(), Base::Nf4)), 0);
    }

    #[test]
    fn a_whole_model_and_its_state_do_not_fit_where_its_quantised_base_does() {
        let config = tiny::llama_7b();
        let lora = Lora { rank: 8, alpha: 16.0, dropout: 0.0, targets: vec!["all-linear".to_owned()] };
        let limits = Limits { host: Some(64 << 30), reserved: None, device: Some(24 << 30) };
        let whole = need(&config, Method::Full, 1);
        assert!(!whole.fits(limits));
        // 6.7e9 weights: 13.5 GB in bf16, masters and moments 81 GB.
        assert!(whole.device > 13_400_000_000 && whole.host > 80_000_000_000, "{whole}");
        assert!(need(&config, Method::QLoRA(lora, Base::Nf4), 1).fits(limits));
    }

    #[test]
    fn offloaded_inputs_are_on_the_host_and_sharded_weights_nowhere_but_with_their_owners() {
        let config = tiny::llama_7b();
        let table = BlockTable::new(&config);
        let need = |offload, sharded| {
            let recipe = Recipe { offload, ..recipe(Method::Full, Precision::Bf16) };
            let workload =
                Workload { config: &config, table: &table, recipe: &recipe, gpu: true, data: 0, slow_store: true };
            workload.need(4, sharded)
        };
        let (plain, offloaded, sharded) = (need(false, false), need(true, false), need(false, true));
        // 4 micro-batches of 2048 tokens through 32 layers of 4096.
        let inputs = 4 * 2048 * 32 * 4096 * 2;
        assert_eq!(offloaded.device, plain.device - inputs);
        assert_eq!(plain.host, offloaded.host, "what the backward pass's end takes there is more");
        // 6.7e9 weights but for two layers and the like.
        assert!(plain.device - sharded.device > 12_000_000_000, "{plain} {sharded}");
    }

    #[test]
    fn weights_are_sharded_where_they_would_not_fit_otherwise() {
        let config = tiny::llama_7b();
        let table = BlockTable::new(&config);
        let chosen = |parameters, gigabytes: u64| {
            let recipe = Recipe { parameters, ..recipe(Method::Full, Precision::Bf16) };
            let workload =
                Workload { config: &config, table: &table, recipe: &recipe, gpu: true, data: 0, slow_store: true };
            workload.need_within(4, Limits { device: Some(gigabytes << 30), ..Limits::default() }).sharded
        };
        assert_eq!([80, 12].map(|size| chosen(Parameters::Auto, size)), [false, true]);
        assert_eq!([80, 12].map(|size| chosen(Parameters::Replicated, size)), [false, false]);
        assert_eq!([80, 12].map(|size| chosen(Parameters::Sharded, size)), [true, true]);
    }

    #[test]
    fn more_ranks_never_need_more_each_beyond_two() {
        let config = tiny::llama_7b();
        let needs: Vec<Need> = (2..=16).map(|ranks| need(&config, Method::Full, ranks)).collect();
        for pair in needs.windows(2) {
            assert!(pair[1].host <= pair[0].host && pair[1].device <= pair[0].device, "{} {}", pair[0], pair[1]);
        }
    }

    #[test]
    fn the_parts_are_the_whole() {
        let needed = need(&tiny::llama_7b(), Method::Full, 4);
        let sum =
            |on_device| needed.parts.iter().filter(|part| part.on_device == on_device).map(|part| part.bytes).sum();
        assert_eq!((needed.host, needed.device), (sum(false), sum(true)));
        assert!(needed.parts.is_sorted_by_key(|part| std::cmp::Reverse(part.bytes)));
    }
}
