//! One step: gradients, their sums, the commit, the update, the new weights.

pub mod commit;
pub mod gradients;
pub mod reduce;
pub mod weights;

use crate::adapters::AdaptedBase;
use crate::batch::{Dataset, MicroBatch, StepPlan};
use crate::blocks::{BlockTable, Parameter};
use crate::collective::{Collective, CollectiveError};
use crate::layout::Layout;
use crate::log::Log;
use crate::optimizer::{Update, clip_scale, squared_norm};
use crate::pace::Pace;
use crate::parallel;
use crate::schedule::learning_rate;
use crate::state::{BlockState, Weights, read_block};
use commit::{Contribution, Terms, Wishes};
use gradients::{Computation, GroupGradients};
use reduce::{Reduction, Task};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tokio_util::sync::CancellationToken;
use vicuna_model::layers::Rope;
use vicuna_model::{Config, ModelError};
use vicuna_protocol::job::Recipe;
use weights::{Held, Owners, Purpose, Route};

#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("torch failed: {0}")]
    Torch(#[from] tch::TchError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("the prepared sequences cannot be read from the scratch folder: {0}")]
    Data(#[from] std::io::Error),
}

impl StepError {
    pub(crate) fn malformed(rank: usize, detail: &str) -> Self {
        let peer = format!("rank {rank}");
        CollectiveError::Protocol { peer, detail: detail.to_owned() }.into()
    }
}

/// Model and optimizer state of one rank. It outlives the generation that it was trained in: the next
/// one may go on from it.
#[derive(Debug)]
pub struct Engine {
    pub config: Config,
    pub table: Arc<BlockTable>,
    held: Held,
    /// Masters and moments of the blocks that this rank keeps, as owner or twin.
    pub blocks: BTreeMap<usize, BlockState>,
    /// Finished gradients of the step after `step`, of blocks in `blocks`.
    pub pending: BTreeMap<usize, Vec<f32>>,
    pub layout: Layout,
    /// The last step done.
    pub step: u64,
    /// Steps that changed the weights.
    pub updates: u64,
    /// What the last step came to, if it was made here.
    pub last: Option<StepReport>,
    /// What there is to know of the last step for a rank that has yet to apply it.
    pub committed: Committed,
    /// How long the last checkpoint held up the training.
    pub stall: Option<Duration>,
    /// When a checkpoint was last complete, or the state was loaded.
    pub saved_at: Instant,
    /// Lines that may not be in the store yet.
    pub log: Log,
    /// All of these lines: a newcomer has none before it is given them.
    pub has_lines: bool,
    pace: Pace,
    rope: Rope,
    /// What passes compute in, and where.
    kind: Kind,
    device: Device,
    adapted: Option<AdaptedBase>,
    /// What may be kept of the way forward.
    pub room: Room,
}

/// Memory for whole layers between the way forward and the way back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub bytes: u64,
    /// What a layer takes for one token.
    pub bytes_a_token: u64,
    /// What it takes besides: its weights, where they would go after the way forward.
    pub bytes_a_layer: u64,
}

impl Room {
    /// How many layers go into it, of `tokens` each.
    fn layers(self, tokens: usize) -> usize {
        let one = self.bytes_a_token.saturating_mul(tokens as u64).saturating_add(self.bytes_a_layer);
        self.bytes.checked_div(one).map_or(0, |layers| usize::try_from(layers).unwrap_or(usize::MAX))
    }
}

/// What a step came to; the same on every rank but for the times.
#[derive(Clone, Debug)]
pub struct StepReport {
    pub step: u64,
    /// Mean over the trained tokens; NaN if there were none.
    pub loss: f64,
    pub norm: f64,
    pub learning_rate: f64,
    pub tokens: u64,
    /// The weights changed.
    pub updated: bool,
    /// Loss or gradient were not finite.
    pub broken: bool,
    pub wishes: Wishes,
    /// Who leaves the generation, by rank.
    pub leaving: Vec<bool>,
    pub duration: Duration,
    /// Sending, and waiting for peers.
    pub communication: Duration,
}

/// Whom a step talks to.
#[derive(Clone, Copy)]
pub struct Peers<'a> {
    pub collective: &'a dyn Collective,
    pub abort: &'a CancellationToken,
}

/// A step that was committed by somebody, for a rank that has not applied it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Committed {
    pub norm: f64,
    /// It changes the weights.
    pub updated: bool,
}

impl Engine {
    pub fn new(
        config: Config,
        table: Arc<BlockTable>,
        held: Held,
        layout: Layout,
        longest: usize,
        (kind, device): (Kind, Device),
        adapted: Option<AdaptedBase>,
    ) -> Self {
        debug_assert!(adapted.is_some() || gradients::is_canonical(&table));
        let rope = Rope::new(&config, longest, device, kind);
        Self {
            config,
            table,
            held,
            blocks: BTreeMap::new(),
            pending: BTreeMap::new(),
            pace: Pace::new(layout.world()),
            layout,
            step: 0,
            updates: 0,
            last: None,
            committed: Committed::default(),
            stall: None,
            saved_at: Instant::now(),
            log: Log::default(),
            has_lines: false,
            rope,
            kind,
            device,
            adapted,
            room: Room::default(),
        }
    }

    /// Takes a place in another generation. Blocks that are not this rank's any more stay until
    /// [`Engine::forget_strays`], in case that generation does not come about.
    pub fn enter(&mut self, layout: Layout) {
        self.pace = Pace::new(layout.world());
        self.layout = layout;
    }

    /// Has weights as the generation agreed on: replicated ones that were sharded are lacking.
    pub fn hold(&mut self, sharded: bool) {
        match (&self.held, sharded) {
            (Held::All { .. }, true) => self.held = Held::Own,
            (Held::Own, false) => {
                let weights = Weights::zeros(&self.table, self.kind, self.device);
                self.held = Held::All { weights, step: None };
            }
            (Held::All { .. }, false) | (Held::Own, true) => {}
        }
    }

    /// Whether all compute weights of the present step are here.
    pub fn has_weights(&self) -> bool {
        matches!(self.held, Held::All { step: Some(step), .. } if step == self.step)
    }

    /// Drops blocks that others keep.
    pub fn forget_strays(&mut self, rank: usize) {
        let layout = &self.layout;
        self.blocks.retain(|block, _| layout.keeps(rank, *block));
    }

    /// Runs the step after the last one. If it fails, the engine stands where it stood before or, once
    /// the step is committed, after it. `wishes` is asked when the gradients are there.
    pub fn advance(
        &mut self,
        recipe: &Recipe,
        data: &Dataset,
        peers: Peers<'_>,
        wishes: &dyn Fn() -> Wishes,
    ) -> Result<StepReport, StepError> {
        let started = Instant::now();
        let plan = data.plan(self.step + 1);
        let trains = plan.trained_tokens > 0;
        let shares = self.pace.shares(plan.micro_batches.len() as u32);
        self.pending.clear();
        let mut own = Contribution::default();
        let mut communication = Duration::ZERO;
        if trains {
            communication = self.gradients(recipe, &plan, data, peers, &shares, &mut own)?;
        }
        let exchanged = Instant::now();
        own.wishes = wishes();
        let terms = Terms { step: plan.step, layout: &self.layout, shares: &shares, trains };
        let commit = commit::exchange(terms, peers.collective, peers.abort, &own)?;
        communication += exchanged.elapsed();
        self.pace.learn(&commit.seconds);
        let rate = learning_rate(recipe, plan.step, data.steps());
        let updated = trains && commit.is_finite();
        self.follow(recipe, data, Committed { norm: commit.norm, updated });
        let mut report = StepReport {
            step: plan.step,
            loss: commit.loss_sum / plan.trained_tokens as f64,
            norm: commit.norm,
            learning_rate: rate,
            tokens: plan.tokens,
            updated,
            broken: !commit.is_finite(),
            wishes: commit.wishes,
            leaving: commit.leaving,
            duration: started.elapsed(),
            communication,
        };
        self.last = Some(report.clone());
        if updated {
            let sending = Instant::now();
            self.gather(peers, &vec![true; peers.collective.world()])?;
            report.communication += sending.elapsed();
            report.duration = started.elapsed();
        }
        Ok(report)
    }

    /// Computes the own micro-batches and reduces: leaves the finished gradients of kept blocks in
    /// `pending`, even if it fails on the way, and losses and norms in `own`. Returns the time spent
    /// on communication.
    fn gradients(
        &mut self,
        recipe: &Recipe,
        plan: &StepPlan,
        data: &Dataset,
        peers: Peers<'_>,
        shares: &[Range<u32>],
        own: &mut Contribution,
    ) -> Result<Duration, StepError> {
        let started = Instant::now();
        let rank = peers.collective.rank();
        let share = shares[rank].clone();
        let mine = &plan.micro_batches[share.start as usize..share.end as usize];
        let batches = mine.iter().map(|sequences| data.micro_batch(sequences)).collect::<std::io::Result<Vec<_>>>()?;
        let whole_layers = self.whole_layers(plan, data, shares, rank);
        let mut pending = std::mem::take(&mut self.pending);
        let mut reduction = Reduction::new(Task {
            table: &self.table,
            layout: &self.layout,
            collective: peers.collective,
            abort: peers.abort,
            step: plan.step,
            shares,
            tokens: plan.trained_tokens,
            tied: self.config.tie_word_embeddings,
        });
        let computation = Computation { whole_layers, offload: recipe.offload, ..self.computation(peers.abort) };
        let route = self.route(whole_layers);
        let computed = self.owners(peers).pass(&self.held, Purpose::Step, &route, |weights| {
            let add = |partial| reduction.add(partial, &mut pending);
            let losses = computation.run(weights, share.start, &batches, add)?;
            Ok((losses, reduction.finish(&mut pending)? + weights.waited()))
        });
        self.pending = pending;
        let (losses, communication) = computed?;
        own.losses = losses;
        own.seconds = started.elapsed().saturating_sub(communication).as_secs_f64();
        let witnessed = self.layout.witnessed(rank).filter_map(|block| Some((block, self.pending.get(&block)?)));
        let norms = parallel::map(parallel::threads(), witnessed.collect(), |(block, gradient)| {
            (block, squared_norm(gradient))
        });
        own.norms = norms.into_iter().collect();
        Ok(communication)
    }

    /// How many of the last layers are kept whole. Of sharded weights as many on every rank: a layer that runs again is
    /// gathered again, by all.
    fn whole_layers(&self, plan: &StepPlan, data: &Dataset, shares: &[Range<u32>], rank: usize) -> usize {
        let tokens = |share: &Range<u32>| {
            let micro_batches = &plan.micro_batches[share.start as usize..share.end as usize];
            micro_batches.iter().map(|sequences| data.padded_tokens(sequences)).sum::<usize>()
        };
        let layers = match self.held {
            Held::All { .. } => self.room.layers(tokens(&shares[rank])),
            Held::Own => self.room.layers(shares.iter().map(tokens).max().unwrap_or(0)),
        };
        layers.min(self.config.layers)
    }

    /// Of a pass that keeps so many of the last layers whole.
    fn route(&self, whole_layers: usize) -> Route {
        Route::there_and_back(&self.table, self.config.tie_word_embeddings, self.config.layers - whole_layers)
    }

    fn owners<'a>(&'a self, peers: Peers<'a>) -> Owners<'a> {
        Owners {
            table: &self.table,
            layout: &self.layout,
            blocks: &self.blocks,
            step: self.step,
            kind: self.kind,
            device: self.device,
            peers,
        }
    }

    /// Loss sums of micro-batches of an evaluation's round, whose first one is `first`, forward only.
    pub(crate) fn losses(&self, first: u32, batches: &[MicroBatch], peers: Peers<'_>) -> Result<Vec<f64>, StepError> {
        let route = Route::forward(&self.table, self.config.tie_word_embeddings);
        let computation = self.computation(peers.abort);
        let purpose = Purpose::Evaluation(first);
        self.owners(peers).pass(&self.held, purpose, &route, |weights| computation.losses(weights, batches))
    }

    /// Who runs which of a pass's micro-batches, by rank, steps' shares left as they are.
    pub(crate) fn shares_apart(&self, micro_batches: u32) -> Vec<Range<u32>> {
        self.pace.shares_apart(micro_batches)
    }

    /// Of the step after the last one.
    fn computation<'a>(&'a self, abort: &'a CancellationToken) -> Computation<'a> {
        Computation {
            config: &self.config,
            table: &self.table,
            rope: &self.rope,
            device: self.device,
            adapted: self.adapted.as_ref(),
            step: self.step + 1,
            whole_layers: 0,
            offload: false,
            abort,
        }
    }

    /// Applies the step after the last one, which is committed and whose gradients are in `pending`.
    /// Touches nothing outside this rank, and so cannot fail half-way.
    pub fn follow(&mut self, recipe: &Recipe, data: &Dataset, committed: Committed) {
        let pending = std::mem::take(&mut self.pending);
        self.step += 1;
        self.last = None;
        self.committed = committed;
        if let Held::All { step, .. } = &mut self.held {
            *step = step.filter(|_| !committed.updated).map(|_| self.step);
        }
        if !committed.updated {
            return;
        }
        self.updates += 1;
        let update = Update {
            learning_rate: learning_rate(recipe, self.step, data.steps()),
            weight_decay: recipe.weight_decay,
            scale: clip_scale(committed.norm, recipe.gradient_clip),
            count: self.updates,
        };
        // What has no gradient here stays behind, and is of no use to anyone.
        self.blocks.retain(|index, _| pending.contains_key(index));
        let table = &self.table;
        let kept = self.blocks.iter_mut().filter_map(|(index, state)| Some((*index, state, pending.get(index)?)));
        parallel::map(parallel::threads(), kept.collect(), |(index, state, gradient)| {
            state.update(table, &table.blocks[index], gradient, update);
        });
    }

    /// Brings owners' weights to the ranks that lack them, where weights are replicated. Who keeps a block has them already.
    pub fn gather(&mut self, peers: Peers<'_>, lacking: &[bool]) -> Result<(), StepError> {
        let (kind, device) = (self.kind, self.device);
        let Self { held, table, layout, blocks, step, .. } = self;
        let Held::All { weights, step: complete } = held else { return Ok(()) };
        let lacks = lacking[peers.collective.rank()];
        let owners = Owners { table, layout, blocks, step: *step, kind, device, peers };
        owners.bring(lacking, lacks.then_some(weights))?;
        if lacks {
            *complete = Some(*step);
        }
        Ok(())
    }

    /// Gives rank 0 all compute weights, one after another in canonical order, with what the other ranks have of them. Those do
    /// not run ahead of it, or its messages would fill its memory while it writes.
    pub fn each_weight(
        &self,
        peers: Peers<'_>,
        mut work: impl FnMut(&Parameter, &Tensor) -> Result<(), ModelError>,
    ) -> Result<(), StepError> {
        let Peers { collective, abort } = peers;
        let gathers = matches!(self.held, Held::Own) && collective.world() > 1;
        self.each_group(Purpose::Result, peers, |group, tensors| {
            let written = Purpose::Written(group as u32).tag(self.step, 0);
            if collective.rank() != 0 {
                return if gathers { Ok(collective.receive(0, written, abort).map(drop)?) } else { Ok(()) };
            }
            let parameters = &self.table.parameters[self.table.group_parameters(group)];
            parameters.iter().zip(tensors).try_for_each(|(parameter, tensor)| work(parameter, tensor))?;
            if gathers { Ok(collective.broadcast(written, &[])?) } else { Ok(()) }
        })
    }

    /// All weights in canonical order, which every rank goes through at the same time.
    fn each_group(
        &self,
        purpose: Purpose,
        peers: Peers<'_>,
        mut work: impl FnMut(usize, &[Tensor]) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let route = Route::everything(&self.table);
        self.owners(peers).pass(&self.held, purpose, &route, |weights| {
            route.groups().try_for_each(|group| work(group, &weights.take(group)?))
        })
    }

    /// Digest of the gradients of one micro-batch on the present weights: what a rank of another
    /// numerics class would compute differently.
    pub fn canary(&self, data: &Dataset, peers: Peers<'_>) -> Result<String, StepError> {
        let plan = data.plan(self.step + 1);
        let mut hasher = blake3::Hasher::new();
        let Some(first) = plan.micro_batches.first().filter(|_| plan.trained_tokens > 0) else {
            return Ok(hasher.finalize().to_hex().to_string());
        };
        let batch = data.micro_batch(first)?;
        let computation = self.computation(peers.abort);
        let losses = self.owners(peers).pass(&self.held, Purpose::Canary, &self.route(0), |weights| {
            computation.run(weights, 0, std::slice::from_ref(&batch), |partial| {
                let hash = |(_, sum): &(_, GroupGradients)| self.hash(partial.group, sum.tensors(), &mut hasher);
                partial.sums.iter().try_for_each(hash)
            })
        })?;
        hasher.update(bytemuck::cast_slice(&losses));
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Digest of the weights that passes compute with; the same whether they are replicated or sharded.
    pub fn digest(&self, peers: Peers<'_>) -> Result<String, StepError> {
        let mut hasher = blake3::Hasher::new();
        self.each_group(Purpose::Digest, peers, |group, tensors| self.hash(group, tensors, &mut hasher))?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Takes in a group's tensors, block by block, as fp32.
    fn hash(&self, group: usize, tensors: &[Tensor], hasher: &mut blake3::Hasher) -> Result<(), StepError> {
        let first = self.table.group_parameters(group).start;
        for index in self.table.group_blocks(group) {
            let values = read_block(&self.table.blocks[index], |parameter| &tensors[parameter - first])?;
            hasher.update(bytemuck::cast_slice(&values));
        }
        Ok(())
    }
}

/// Passes whose weights may wait at a rank that owns nothing, and so holds nobody up: a digest, and two ways each of a
/// canary and of a step.
const PASSES_AHEAD: usize = 5;

/// Bytes that may wait unread at a rank: the weights of some passes, the gradients of the blocks that it is twin of, the
/// state of those that it is to keep, the partial sums of two groups of the largest size from
/// everyone, and small change.
pub fn unread_limit_bytes(table: &BlockTable, micro_batches: u32, world: usize) -> usize {
    let levels = (u32::BITS - micro_batches.leading_zeros()) as usize + 1;
    let largest = table.parameters.iter().map(|parameter| parameter.elements).max().unwrap_or(0);
    let kept = 2 * table.elements().div_ceil(world.max(1));
    4 * PASSES_AHEAD * table.elements() + (4 + 12) * kept + 4 * 3 * largest * 2 * levels * world.max(1) + (64 << 20)
}
