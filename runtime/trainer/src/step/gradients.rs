//! A rank's part of the gradients, layer by layer.
//!
//! All local micro-batches pass one layer before any passes the next; only layers' inputs are kept,
//! and each layer runs again for its gradient. A layer's sums are handed on before the next layer's
//! exist.

use crate::batch::MicroBatch;
use crate::blocks::{BlockTable, EMBEDDING_GROUP};
use crate::collective::CollectiveError;
use crate::state::Weights;
use crate::tree::{Node, Summand, TreeSum};
use tch::{Device, Kind, Tensor};
use tokio_util::sync::CancellationToken;
use vicuna_model::gradients::{embedding_backward, head_backward, layer_backward};
use vicuna_model::layers::{LayerWeights, Rope, cross_entropy_sum, embed, layer_forward};
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

/// In which order partials of a step come: the same on every rank, also on one without micro-batches.
pub fn order(table: &BlockTable, config: &Config) -> Vec<(usize, u8)> {
    let mut order = vec![(table.head_group(), 0)];
    if config.tie_word_embeddings {
        order.push((EMBEDDING_GROUP, 0));
    }
    order.extend((0..config.layers).rev().map(|layer| (BlockTable::layer_group(layer), 0)));
    order.push((EMBEDDING_GROUP, u8::from(config.tie_word_embeddings)));
    order
}

/// The model as gradients need it.
#[derive(Debug)]
pub struct Computation<'a> {
    pub config: &'a Config,
    pub table: &'a BlockTable,
    pub weights: &'a Weights,
    pub rope: &'a Rope,
    pub device: Device,
    /// Looked at between layers.
    pub abort: &'a CancellationToken,
}

struct Batch {
    ids: Tensor,
    labels: Tensor,
}

impl Computation<'_> {
    /// Runs micro-batches `first..` and hands on each group's sums as soon as they are there, in
    /// [`order`]. Returns the loss sums of the micro-batches.
    pub fn run<E: From<CollectiveError>>(
        &self,
        first: u32,
        micro_batches: &[MicroBatch],
        mut hand_on: impl FnMut(Partial) -> Result<(), E>,
    ) -> Result<Vec<f64>, E> {
        let batches: Vec<Batch> = micro_batches.iter().map(|batch| self.batch(batch)).collect();
        let mut inputs = self.forward(&batches)?;
        let (losses, mut upstream) = self.head(first, &batches, &inputs.pop().unwrap_or_default(), &mut hand_on)?;
        for layer in (0..self.config.layers).rev() {
            let weights = self.layer_weights(layer);
            let inputs = inputs.pop().unwrap_or_default();
            let mut sum = TreeSum::default();
            for (index, (input, upstream)) in inputs.iter().zip(&mut upstream).enumerate() {
                let gradients = layer_backward(self.config, &weights, input, self.rope, upstream);
                *upstream = gradients.input;
                let values = gradients.weights.as_vec().into_iter().map(Tensor::shallow_clone).collect();
                sum.push(Node::leaf(first + index as u32), GroupGradients(values));
            }
            hand_on(partial(BlockTable::layer_group(layer), 0, sum))?;
        }
        self.embedding(first, &batches, &upstream, &mut hand_on)?;
        Ok(losses)
    }

    /// Loss sum of one micro-batch, forward only.
    pub fn loss(&self, batch: &MicroBatch) -> f64 {
        let batch = self.batch(batch);
        let mut x = embed(&self.weights.tensors[0], &batch.ids);
        for layer in 0..self.config.layers {
            x = layer_forward(self.config, &self.layer_weights(layer), &x, self.rope);
        }
        let (norm, projection) = self.head_weights();
        let loss = cross_entropy_sum(self.config, &x, norm, projection, &batch.labels);
        loss.to_kind(Kind::Double).double_value(&[])
    }

    /// The final norm and the output projection.
    fn head_weights(&self) -> (&Tensor, &Tensor) {
        let head = self.table.group_parameters(self.table.head_group()).start;
        let projection = if self.config.tie_word_embeddings { 0 } else { head + 1 };
        (&self.weights.tensors[head], &self.weights.tensors[projection])
    }

    fn batch(&self, batch: &MicroBatch) -> Batch {
        let shape = [batch.rows as i64, batch.length as i64];
        let tensor = |values: &[i64]| Tensor::from_slice(values).view(shape).to_device(self.device);
        Batch { ids: tensor(&batch.ids), labels: tensor(&batch.labels) }
    }

    #[expect(clippy::expect_used, reason = "the table and the weights are of one configuration")]
    fn layer_weights(&self, layer: usize) -> LayerWeights {
        let range = self.table.group_parameters(BlockTable::layer_group(layer));
        LayerWeights::from_slice(&self.weights.tensors[range]).expect("a whole layer")
    }

    /// The inputs of every layer and, last, what comes out of the last one; by micro-batch each.
    fn forward(&self, batches: &[Batch]) -> Result<Vec<Vec<Tensor>>, CollectiveError> {
        let embedding = &self.weights.tensors[0];
        let mut inputs = vec![batches.iter().map(|batch| embed(embedding, &batch.ids)).collect::<Vec<_>>()];
        for layer in 0..self.config.layers {
            if self.abort.is_cancelled() {
                return Err(CollectiveError::Aborted);
            }
            let weights = self.layer_weights(layer);
            let next = inputs[layer].iter().map(|x| layer_forward(self.config, &weights, x, self.rope));
            let next = next.collect();
            inputs.push(next);
        }
        Ok(inputs)
    }

    fn head<E>(
        &self,
        first: u32,
        batches: &[Batch],
        hidden: &[Tensor],
        hand_on: &mut impl FnMut(Partial) -> Result<(), E>,
    ) -> Result<(Vec<f64>, Vec<Tensor>), E> {
        let tied = self.config.tie_word_embeddings;
        let (norm, projection) = self.head_weights();
        let (mut losses, mut upstream) = (Vec::new(), Vec::new());
        let (mut sum, mut tied_sum) = (TreeSum::default(), TreeSum::default());
        for (index, (batch, hidden)) in batches.iter().zip(hidden).enumerate() {
            let gradients = head_backward(self.config, hidden, norm, projection, &batch.labels);
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
        hand_on(partial(self.table.head_group(), 0, sum))?;
        if tied {
            hand_on(partial(EMBEDDING_GROUP, 0, tied_sum))?;
        }
        Ok((losses, upstream))
    }

    fn embedding<E>(
        &self,
        first: u32,
        batches: &[Batch],
        upstream: &[Tensor],
        hand_on: &mut impl FnMut(Partial) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut sum = TreeSum::default();
        for (index, (batch, upstream)) in batches.iter().zip(upstream).enumerate() {
            let gradient = embedding_backward(self.config, &batch.ids, upstream);
            sum.push(Node::leaf(first + index as u32), GroupGradients(vec![gradient]));
        }
        hand_on(partial(EMBEDDING_GROUP, u8::from(self.config.tie_word_embeddings), sum))
    }
}

fn partial(group: usize, part: u8, sum: TreeSum<GroupGradients>) -> Partial {
    Partial { group, part, sums: sum.into_nodes() }
}

/// Names that [`Weights`] must hold first and last; checked once, so that indexing is safe.
pub fn is_canonical(table: &BlockTable) -> bool {
    let head = table.group_parameters(table.head_group());
    table.parameters[0].name == parameters::EMBEDDING && table.parameters[head.start].name == parameters::FINAL_NORM
}
