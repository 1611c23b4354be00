//! A rank's part of the gradients, layer by layer.
//!
//! All local micro-batches pass one layer before any passes the next. Of the last layers, as far as
//! memory goes, everything that their way back needs is kept; of those below only their inputs, and they
//! run again for their gradients. A layer's weights are asked for once on each way ([`super::weights`]) and let go before
//! the next layer's; its sums are handed on before the next layer's exist.

use super::StepError;
use super::weights::Source;
use crate::adapters::AdaptedBase;
use crate::batch::MicroBatch;
use crate::blocks::{BlockTable, EMBEDDING_GROUP};
use crate::collective::CollectiveError;
use crate::tree::{Node, Summand, TreeSum};
use tch::{Device, Kind, TchError, Tensor};
use tokio_util::sync::CancellationToken;
use vicuna_model::gradients::{LayerRun, embedding_backward, frozen_head_backward, head_backward};
use vicuna_model::layers::{LayerWeights, Rope, cross_entropy_sum, embed, layer_forward};
use vicuna_model::lora::{AdaptedRun, LayerAdapters, adapted_layer_forward};
use vicuna_model::{Config, parameters};

/// Gradients of a group's parameters, in order. A micro-batch's are of the kind that it was computed
/// in, sums are fp32: values of 16 bits turn into fp32 as they are added, not before, which moves
/// less memory and gives the same bits.
#[derive(Debug)]
pub struct GroupGradients(Vec<Tensor>);

impl GroupGradients {
    pub fn tensors(&self) -> &[Tensor] {
        &self.0
    }
}

impl Summand for GroupGradients {
    fn add(&mut self, right: Self) {
        for (sum, value) in self.0.iter_mut().zip(right.0) {
            if sum.kind() != Kind::Float {
                *sum = sum.to_kind(Kind::Float);
            }
            // In place: a sum of the size of the embedding is not allocated again.
            let _same = sum.g_add_(&value);
        }
    }
}

/// What a rank has to say about one group: the sums of whole tree nodes.
#[derive(Debug)]
pub struct Partial {
    pub group: usize,
    /// A tied embedding's gradient comes in two parts, summed each in its own tree: 0 from the
    /// output projection, 1 from the embedding.
    pub part: u8,
    pub sums: Vec<(Node, GroupGradients)>,
}

/// The model as gradients need it.
#[derive(Debug)]
pub struct Computation<'a> {
    pub config: &'a Config,
    pub table: &'a BlockTable,
    pub rope: &'a Rope,
    pub device: Device,
    /// The frozen model, where what is trained are its adapters.
    pub adapted: Option<&'a AdaptedBase>,
    pub step: u64,
    /// How many of the last layers are kept whole from the way forward to the way back. It does not change a bit.
    pub whole_layers: usize,
    /// The other layers' inputs wait on the host for their way back. Nor does that.
    pub offload: bool,
    /// Looked at between layers.
    pub abort: &'a CancellationToken,
}

/// A layer's weights, and its adapters where those are what is trained.
struct Layer<'a> {
    index: usize,
    weights: LayerWeights,
    adapters: Option<(LayerAdapters<'a>, &'a AdaptedBase)>,
}

/// What the micro-batches' way through a layer leaves for their way back.
enum Passed {
    Inputs(Vec<Tensor>),
    Whole(Vec<Run>),
}

enum Run {
    Trained(LayerRun),
    Adapted(AdaptedRun),
}

impl Run {
    fn output(&self) -> Tensor {
        match self {
            Self::Trained(run) => run.output(),
            Self::Adapted(run) => run.output(),
        }
    }

    /// The gradients of the layer's input and of what is trained in it.
    fn backward(self, upstream: &Tensor) -> (Tensor, GroupGradients) {
        match self {
            Self::Trained(run) => {
                let gradients = run.backward(upstream);
                (gradients.input, GroupGradients(gradients.weights.into_vec()))
            }
            Self::Adapted(run) => {
                let gradients = run.backward(upstream);
                (gradients.input, GroupGradients(gradients.adapters))
            }
        }
    }
}

struct Batch {
    ids: Tensor,
    labels: Tensor,
    rope: Rope,
}

impl Computation<'_> {
    /// Runs micro-batches `first..` and hands on each group's sums as soon as they are there, in the same
    /// order on every rank, also on one without micro-batches: the head, the tied embedding's first part,
    /// layers from the last to the first, the embedding; of adapters only the layers. Returns the loss
    /// sums of the micro-batches.
    pub fn run(
        &self,
        weights: &mut Source<'_>,
        first: u32,
        micro_batches: &[MicroBatch],
        mut hand_on: impl FnMut(Partial) -> Result<(), StepError>,
    ) -> Result<Vec<f64>, StepError> {
        let batches: Vec<Batch> = micro_batches.iter().map(|batch| self.batch(batch)).collect();
        let (mut passed, hidden) = self.forward(weights, first, &batches)?;
        let (losses, mut upstream) = match self.adapted {
            Some(base) => self.frozen_head(base, &batches, &hidden),
            None => self.head(weights, first, &batches, &hidden, &mut hand_on)?,
        };
        drop(hidden);
        for index in (0..self.config.layers).rev() {
            if let Some(passed) = passed.pop() {
                let sum = self.layer_back(weights, index, first, &batches, passed, &mut upstream)?;
                hand_on(partial(BlockTable::layer_group(index), 0, sum))?;
            }
        }
        if self.adapted.is_none() {
            self.embedding(first, &batches, &upstream, &mut hand_on)?;
        }
        Ok(losses)
    }

    /// Loss sums of micro-batches, forward only and without dropout.
    pub fn losses(&self, weights: &mut Source<'_>, micro_batches: &[MicroBatch]) -> Result<Vec<f64>, StepError> {
        let batches: Vec<Batch> = micro_batches.iter().map(|batch| self.batch(batch)).collect();
        let mut hidden = self.embedded(weights, &batches)?;
        for index in 0..self.config.layers {
            let layer = self.layer(weights, index)?;
            for (batch, x) in batches.iter().zip(&mut hidden) {
                self.check()?;
                *x = self.layer_forward(&layer, None, x, &batch.rope);
            }
        }
        let (norm, projection) = match self.adapted {
            Some(base) => (base.frozen.final_norm(), base.frozen.head()),
            None => self.head_weights(weights)?,
        };
        let loss = |(batch, x): (&Batch, &Tensor)| cross_entropy_sum(self.config, x, &norm, &projection, &batch.labels);
        Ok(batches.iter().zip(&hidden).map(|pair| loss(pair).to_kind(Kind::Double).double_value(&[])).collect())
    }

    fn check(&self) -> Result<(), CollectiveError> {
        if self.abort.is_cancelled() { Err(CollectiveError::Aborted) } else { Ok(()) }
    }

    /// What goes into the first layer, by micro-batch.
    fn embedded(&self, weights: &mut Source<'_>, batches: &[Batch]) -> Result<Vec<Tensor>, StepError> {
        let embedding = match self.adapted {
            Some(base) => base.frozen.embedding(),
            None => weights.take(EMBEDDING_GROUP)?.remove(0),
        };
        Ok(batches.iter().map(|batch| embed(&embedding, &batch.ids)).collect())
    }

    /// The final norm and the output projection.
    fn head_weights(&self, weights: &mut Source<'_>) -> Result<(Tensor, Tensor), StepError> {
        let tied = match self.config.tie_word_embeddings {
            true => weights.take(EMBEDDING_GROUP)?.pop(),
            false => None,
        };
        let mut head = weights.take(self.table.head_group())?;
        let projection = tied.unwrap_or_else(|| head.remove(1));
        Ok((head.remove(0), projection))
    }

    fn batch(&self, batch: &MicroBatch) -> Batch {
        let shape = [batch.rows as i64, batch.length as i64];
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(self.device);
        let rope = match &batch.packed {
            None => self.rope.range(0, batch.length),
            Some(rows) => self.rope.packed(rows, batch.length),
        };
        Batch { ids: tensor(&batch.ids), labels: tensor(&batch.labels), rope }
    }

    fn layer(&self, weights: &mut Source<'_>, index: usize) -> Result<Layer<'_>, StepError> {
        let tensors = weights.take(BlockTable::layer_group(index))?;
        let adapted = self.adapted.and_then(|base| Some((LayerAdapters::from_slice(&base.lora, &tensors)?, base)));
        let weights = match &adapted {
            Some((_, base)) => base.frozen.layer(index),
            None => layer_weights(&tensors),
        };
        Ok(Layer { index, weights, adapters: adapted })
    }

    /// Without a micro-batch's number nothing is dropped.
    fn layer_forward(&self, layer: &Layer<'_>, micro_batch: Option<u32>, x: &Tensor, rope: &Rope) -> Tensor {
        let Layer { index, weights, adapters } = layer;
        let Some((adapters, base)) = adapters else { return layer_forward(self.config, weights, x, rope) };
        let dropout = micro_batch.map(|number| base.dropout(self.step, number, *index));
        adapted_layer_forward(self.config, weights, adapters, x, rope, dropout.as_ref())
    }

    fn layer_run(&self, layer: &Layer<'_>, micro_batch: u32, x: &Tensor, rope: &Rope) -> Run {
        let Layer { index, weights, adapters } = layer;
        let Some((adapters, base)) = adapters else {
            return Run::Trained(LayerRun::new(self.config, weights, x, rope));
        };
        let dropout = base.dropout(self.step, micro_batch, *index);
        Run::Adapted(AdaptedRun::new(self.config, weights, adapters, x, rope, Some(&dropout)))
    }

    /// What every layer leaves, and what comes out of the last one by micro-batch.
    fn forward(
        &self,
        weights: &mut Source<'_>,
        first: u32,
        batches: &[Batch],
    ) -> Result<(Vec<Passed>, Vec<Tensor>), StepError> {
        let mut hidden = self.embedded(weights, batches)?;
        let mut all = Vec::with_capacity(self.config.layers);
        for index in 0..self.config.layers {
            self.check()?;
            let layer = self.layer(weights, index)?;
            let each = (first..).zip(batches).zip(&mut hidden);
            all.push(if index + self.whole_layers >= self.config.layers {
                Passed::Whole(each.map(|((number, batch), x)| self.keep_whole(&layer, number, batch, x)).collect())
            } else {
                let inputs = each.map(|((number, batch), x)| self.keep_input(&layer, number, batch, x));
                Passed::Inputs(inputs.collect::<Result<_, TchError>>()?)
            });
        }
        Ok((all, hidden))
    }

    fn keep_whole(&self, layer: &Layer<'_>, micro_batch: u32, batch: &Batch, x: &mut Tensor) -> Run {
        let run = self.layer_run(layer, micro_batch, x, &batch.rope);
        *x = run.output();
        run
    }

    fn keep_input(
        &self,
        layer: &Layer<'_>,
        micro_batch: u32,
        batch: &Batch,
        x: &mut Tensor,
    ) -> Result<Tensor, TchError> {
        let y = self.layer_forward(layer, Some(micro_batch), x, &batch.rope);
        let x = std::mem::replace(x, y);
        // Into pinned memory, and behind what the GPU has to do: nobody waits for it.
        if self.offload { x.f_internal_to_copy((x.kind(), Device::Cpu), true) } else { Ok(x) }
    }

    /// Carries `upstream`, by micro-batch, back through a layer; the sums of the layer's gradients.
    fn layer_back(
        &self,
        weights: &mut Source<'_>,
        index: usize,
        first: u32,
        batches: &[Batch],
        passed: Passed,
        upstream: &mut [Tensor],
    ) -> Result<TreeSum<GroupGradients>, StepError> {
        let mut sum = TreeSum::default();
        let mut back = |number: u32, run: Run| {
            let above = &mut upstream[(number - first) as usize];
            let (below, gradients) = run.backward(above);
            *above = below;
            sum.push(Node::leaf(number), gradients);
        };
        match passed {
            Passed::Whole(runs) => (first..).zip(runs).for_each(|(number, run)| back(number, run)),
            Passed::Inputs(inputs) => {
                let layer = self.layer(weights, index)?;
                for ((number, x), batch) in (first..).zip(inputs).zip(batches) {
                    let x = x.f_to_dtype_layout((x.kind(), self.device), true, false)?;
                    back(number, self.layer_run(&layer, number, &x, &batch.rope));
                }
            }
        }
        Ok(sum)
    }

    /// Losses, and gradients of what comes out of the last layer.
    fn frozen_head(&self, base: &AdaptedBase, batches: &[Batch], hidden: &[Tensor]) -> (Vec<f64>, Vec<Tensor>) {
        let (norm, projection) = (base.frozen.final_norm(), base.frozen.head());
        let pairs = batches.iter().zip(hidden);
        let losses =
            pairs.map(|(batch, hidden)| frozen_head_backward(self.config, hidden, &norm, &projection, &batch.labels));
        losses.map(|loss| (loss.sum.to_kind(Kind::Double).double_value(&[]), loss.hidden)).unzip()
    }

    fn head(
        &self,
        weights: &mut Source<'_>,
        first: u32,
        batches: &[Batch],
        hidden: &[Tensor],
        hand_on: &mut impl FnMut(Partial) -> Result<(), StepError>,
    ) -> Result<(Vec<f64>, Vec<Tensor>), StepError> {
        let tied = self.config.tie_word_embeddings;
        let (norm, projection) = self.head_weights(weights)?;
        let (mut losses, mut upstream) = (Vec::new(), Vec::new());
        let (mut sum, mut tied_sum) = (TreeSum::default(), TreeSum::default());
        for (index, (batch, hidden)) in batches.iter().zip(hidden).enumerate() {
            let gradients = head_backward(self.config, hidden, &norm, &projection, &batch.labels);
            losses.push(gradients.loss_sum.to_kind(Kind::Double).double_value(&[]));
            upstream.push(gradients.hidden);
            let leaf = Node::leaf(first + index as u32);
            if tied {
                sum.push(leaf, GroupGradients(vec![gradients.norm]));
                tied_sum.push(leaf, GroupGradients(vec![gradients.lm_head]));
            } else {
                sum.push(leaf, GroupGradients(vec![gradients.norm, gradients.lm_head]));
            }
        }
        drop((norm, projection));
        hand_on(partial(self.table.head_group(), 0, sum))?;
        if tied {
            hand_on(partial(EMBEDDING_GROUP, 0, tied_sum))?;
        }
        Ok((losses, upstream))
    }

    fn embedding(
        &self,
        first: u32,
        batches: &[Batch],
        upstream: &[Tensor],
        hand_on: &mut impl FnMut(Partial) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let mut sum = TreeSum::default();
        for (index, (batch, upstream)) in batches.iter().zip(upstream).enumerate() {
            let gradient = embedding_backward(self.config, &batch.ids, upstream);
            sum.push(Node::leaf(first + index as u32), GroupGradients(vec![gradient]));
        }
        hand_on(partial(EMBEDDING_GROUP, u8::from(self.config.tie_word_embeddings), sum))
    }
}

#[expect(clippy::expect_used, reason = "the table and the weights are of one configuration")]
fn layer_weights(tensors: &[Tensor]) -> LayerWeights {
    LayerWeights::from_slice(tensors).expect("a whole layer")
}

fn partial(group: usize, part: u8, sum: TreeSum<GroupGradients>) -> Partial {
    Partial { group, part, sums: sum.into_nodes() }
}

/// Names that the table must have first in its first and last groups; checked once, so that indexing is safe.
pub fn is_canonical(table: &BlockTable) -> bool {
    let head = table.group_parameters(table.head_group());
    table.parameters[0].name == parameters::EMBEDDING && table.parameters[head.start].name == parameters::FINAL_NORM
}
