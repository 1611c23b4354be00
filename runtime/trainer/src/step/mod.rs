//! One step: gradients, their sums, the commit, the update, the new weights.

pub mod commit;
pub mod gradients;
pub mod reduce;

use crate::batch::{Dataset, StepPlan};
use crate::blocks::{BlockTable, owner};
use crate::collective::{Collective, CollectiveError, Kind, Tag};
use crate::optimizer::{Update, clip_scale, squared_norm};
use crate::schedule::learning_rate;
use crate::state::{OwnedBlock, Weights, floats};
use crate::tree;
use commit::{Commit, Contribution, Wishes};
use gradients::Computation;
use reduce::Reduction;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, TchError};
use tokio_util::sync::CancellationToken;
use vicuna_model::Config;
use vicuna_model::layers::Rope;
use vicuna_protocol::job::Recipe;

#[derive(Debug, thiserror::Error)]
pub enum StepError {
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    #[error("torch failed: {0}")]
    Torch(#[from] TchError),
}

impl StepError {
    fn malformed(rank: usize, detail: &str) -> Self {
        let peer = format!("rank {rank}");
        CollectiveError::Protocol { peer, detail: detail.to_owned() }.into()
    }
}

/// Model and optimizer state of one rank in one generation.
#[derive(Debug)]
pub struct Engine {
    pub config: Config,
    pub table: Arc<BlockTable>,
    pub weights: Weights,
    /// Masters and moments of the blocks that this rank owns.
    pub owned: BTreeMap<usize, OwnedBlock>,
    /// The last step done.
    pub step: u64,
    /// Steps that changed the weights.
    pub updates: u64,
    rope: Rope,
    device: Device,
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

impl Engine {
    pub fn new(
        config: Config,
        table: Arc<BlockTable>,
        weights: Weights,
        owned: BTreeMap<usize, OwnedBlock>,
        longest: usize,
        device: Device,
    ) -> Self {
        debug_assert!(gradients::is_canonical(&table));
        let rope = gradients::rope(&config, longest, device);
        Self { config, table, weights, owned, step: 0, updates: 0, rope, device }
    }

    /// Runs the step after the last one.
    pub fn advance(
        &mut self,
        recipe: &Recipe,
        data: &Dataset,
        peers: Peers<'_>,
        wishes: Wishes,
    ) -> Result<StepReport, StepError> {
        let started = Instant::now();
        let plan = data.plan(self.step + 1);
        let count = plan.micro_batches.len() as u32;
        let (mut gradients, losses, mut communication) = self.gradients(&plan, data, peers)?;
        let norms = finish(&mut gradients, plan.trained_tokens);
        let exchanged = Instant::now();
        let own = Contribution { wishes, losses, norms };
        let trains = plan.trained_tokens > 0;
        let commit = commit::exchange(&self.table, peers.collective, peers.abort, plan.step, trains, count, &own)?;
        communication += exchanged.elapsed();
        let rate = learning_rate(recipe, plan.step, data.steps());
        let updated = trains && commit.is_finite();
        if updated {
            self.update(recipe, &commit, rate, &gradients);
            let sending = Instant::now();
            self.gather(plan.step, peers)?;
            communication += sending.elapsed();
        }
        self.step = plan.step;
        Ok(StepReport {
            step: plan.step,
            loss: commit.loss_sum / plan.trained_tokens as f64,
            norm: commit.norm,
            learning_rate: rate,
            tokens: plan.tokens,
            updated,
            broken: !commit.is_finite(),
            wishes: commit.wishes,
            duration: started.elapsed(),
            communication,
        })
    }

    /// The summed gradients of the own blocks, and the losses of the own micro-batches.
    #[expect(clippy::type_complexity, reason = "three results of one pass, taken apart at once")]
    fn gradients(
        &self,
        plan: &StepPlan,
        data: &Dataset,
        peers: Peers<'_>,
    ) -> Result<(BTreeMap<usize, Vec<f32>>, Vec<f64>, Duration), StepError> {
        if plan.trained_tokens == 0 {
            return Ok(Default::default());
        }
        let count = plan.micro_batches.len() as u32;
        let share = tree::share(count, peers.collective.world(), peers.collective.rank());
        let mine = &plan.micro_batches[share.start as usize..share.end as usize];
        let batches: Vec<_> = mine.iter().map(|sequences| data.micro_batch(sequences)).collect();
        let mut reduction = Reduction::new(&self.table, peers.collective, peers.abort, plan.step, count);
        let computation = Computation {
            config: &self.config,
            table: &self.table,
            weights: &self.weights,
            rope: &self.rope,
            device: self.device,
        };
        let losses = computation.run(share.start, &batches, |partial| reduction.add(partial))?;
        let (sums, communication) = reduction.finish()?;
        Ok((sums, losses, communication))
    }

    fn update(&mut self, recipe: &Recipe, commit: &Commit, rate: f64, gradients: &BTreeMap<usize, Vec<f32>>) {
        self.updates += 1;
        let update = Update {
            learning_rate: rate,
            weight_decay: recipe.weight_decay,
            scale: clip_scale(commit.norm, recipe.gradient_clip),
            count: self.updates,
        };
        for (index, state) in &mut self.owned {
            if let Some(gradient) = gradients.get(index) {
                state.update(&self.table, &self.table.blocks[*index], gradient, update);
            }
        }
    }

    /// Brings every owner's weights to every rank.
    pub fn gather(&mut self, step: u64, peers: Peers<'_>) -> Result<(), StepError> {
        let (rank, world) = (peers.collective.rank(), peers.collective.world());
        let tag = |block: usize| Tag::new(Kind::Weights, step).block(block);
        for (index, state) in &self.owned {
            peers.collective.broadcast(tag(*index), bytemuck::cast_slice(&state.weights))?;
            self.weights.write(&self.table.blocks[*index], &state.weights)?;
        }
        for index in 0..self.table.blocks.len() {
            let from = owner(index, world);
            if from == rank {
                continue;
            }
            let values = floats(&peers.collective.receive(from, tag(index), peers.abort)?);
            if values.len() != self.table.blocks[index].elements {
                return Err(StepError::malformed(from, "weights of the wrong size"));
            }
            self.weights.write(&self.table.blocks[index], &values)?;
        }
        Ok(())
    }

    /// Digest of the weights, as the worker computes it.
    pub fn digest(&self) -> Result<String, TchError> {
        vicuna_model::weights_digest(&self.weights.to_map(&self.table))
    }
}

/// Divides the sums by the number of trained tokens; returns their squared norms.
fn finish(gradients: &mut BTreeMap<usize, Vec<f32>>, tokens: u64) -> BTreeMap<usize, f64> {
    let tokens = tokens as f32;
    let mut norms = BTreeMap::new();
    for (block, gradient) in gradients {
        gradient.iter_mut().for_each(|value| *value /= tokens);
        norms.insert(*block, squared_norm(gradient));
    }
    norms
}

/// Bytes that may wait unread at a rank: all weights, the partial sums of two groups of the largest
/// size from everyone, and small change.
pub fn unread_limit_bytes(table: &BlockTable, micro_batches: u32, world: usize) -> usize {
    let levels = (u32::BITS - micro_batches.leading_zeros()) as usize + 1;
    let largest = table.parameters.iter().map(|parameter| parameter.elements).max().unwrap_or(0);
    4 * table.elements() + 4 * 3 * largest * 2 * levels * world.max(1) + (64 << 20)
}
