//! What a membership shows to the reconciler, and what it tells as it happens.

use super::record::{Finish, Member};
use std::collections::{BTreeMap, BTreeSet};
use vicuna_protocol::coordinator::Cause;
use vicuna_protocol::coordinator::form::Purpose;

pub type PodUid = String;

/// design.md's states; `Adopting` is a new leader's wait for hellos, `Planning` the swap of the record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    #[default]
    Adopting,
    Held,
    Planning,
    Moving,
    Steady,
    Collecting,
    Stopped,
    Finished,
}

/// A snapshot, replaced as a whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub phase: Phase,
    pub generation: u64,
    /// Members of the generation that trains or forms; empty while there is none.
    pub members: Vec<Member>,
    pub ranks: BTreeMap<PodUid, RankView>,
    pub progress: Option<StepReport>,
    pub evaluation: Option<EvaluationReport>,
    /// What a rank needs in memory, by number of ranks; empty until a rank has read the model's configuration.
    pub memory: Vec<MemoryNeed>,
    /// Changes of the recipe that would fit where that does not, the mildest first.
    pub remedies: Vec<Remedy>,
    pub checkpoint: Option<CheckpointReport>,
    pub disruptions: Counters,
    pub finish: Option<Finish>,
    /// Ranks that ended by themselves, by pod.
    pub failures: BTreeMap<PodUid, RankFailure>,
    /// Pods whose ranks answer no more: to be replaced.
    pub unresponsive: BTreeSet<PodUid>,
    /// What the membership waits for or does, for people.
    pub activity: String,
    /// Steps in the whole run; 0 until a rank has read the data.
    pub steps: u64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RankView {
    pub connected: bool,
    pub prepared: bool,
    pub leaving: bool,
    /// Told to end, since it is not needed.
    pub released: bool,
    pub blocked: Option<Blockage>,
    /// What a checkpoint behind the training waits for.
    pub held_up: Option<Blockage>,
}

/// Something outside a rank that is in its way.
#[derive(Clone, Debug, PartialEq)]
pub struct Blockage {
    pub cause: Cause,
    pub message: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct RankFailure {
    pub cause: Cause,
    pub message: String,
    pub step: u64,
}

/// The last step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    pub generation: u64,
    pub step: u64,
    pub steps: u64,
    pub epoch: f64,
    /// Absent when the step trained no token.
    pub loss: Option<f64>,
    pub learning_rate: f64,
    pub tokens: u64,
    pub step_seconds: f64,
}

/// Loss on what is held out of the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EvaluationReport {
    /// The step after which it was.
    pub step: u64,
    /// Mean per token.
    pub loss: f64,
}

/// What one of `ranks` ranks needs in memory, by a rank's estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeed {
    pub ranks: u32,
    pub host_bytes: u64,
    /// 0 without a GPU.
    pub device_bytes: u64,
    /// Every rank has as much.
    pub fits: bool,
}

impl MemoryNeed {
    /// The fewest ranks among which each has enough, one more than are known where there are none such; 1 where nothing
    /// is known. `needs` begin with one rank.
    pub fn fewest_that_fit(needs: &[Self]) -> u32 {
        needs.iter().find(|need| need.fits).map_or(needs.len() as u32 + 1, |need| need.ranks)
    }
}

/// A change of the recipe that would fit, as a rank has worked it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// "recipe.memory.offload to true", for people.
    pub settings: String,
    /// With at least so many ranks.
    pub ranks: u32,
}

#[derive(Clone, Debug, PartialEq, Default)]
pub struct CheckpointReport {
    pub step: u64,
    pub uri: String,
    pub digest: String,
    /// Unix time in ms when we heard of it.
    pub at_ms: u64,
    /// For how long it held up the training, how long it was on its way, and the time to the next one.
    pub stall_ms: u64,
    pub upload_ms: u64,
    pub interval_ms: u64,
    /// What one rank wrote in a second; 0 where that is not known.
    pub bytes_a_second: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub notices: u64,
    pub reclaims: u64,
    pub lost_steps: u64,
    pub last_recovery_ms: Option<u64>,
}

/// Where the time from the last step before a disruption to the first after it went, in ms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RecoveryPhases {
    /// From the last step to our noticing.
    pub detect: u64,
    /// Until all had left the generation and the next one was recorded.
    pub agree: u64,
    /// Until the state was where it has to be.
    pub restore: u64,
    /// The first step.
    pub step: u64,
}

/// What is counted or told once.
#[derive(Clone, Debug, PartialEq)]
pub enum Happening {
    Stepped(StepReport),
    /// Another quarter of the steps is made.
    Milestone {
        step: u64,
        steps: u64,
        loss: Option<f64>,
    },
    Evaluated(EvaluationReport),
    Checkpointed(CheckpointReport),
    Formed {
        generation: u64,
        members: usize,
        base_step: u64,
        purpose: Purpose,
    },
    Stopping {
        generation: u64,
        planned: bool,
        reason: String,
    },
    Noticed {
        pod: String,
        node: String,
        source: String,
    },
    Reclaimed {
        pod: String,
        node: String,
    },
    Lost {
        pod: String,
        node: String,
    },
    Hung {
        pod: String,
        node: String,
    },
    /// The store will not have what is to be kept before the first node goes.
    CheckpointWillBeLate {
        /// `None`: none has been written yet by which to tell.
        needs_ms: Option<u64>,
        has_ms: u64,
        /// Of the whole state; 0 where no rank has said it.
        bytes: u64,
        /// The last step that the store has.
        durable_step: Option<u64>,
    },
    /// The training goes on, and its checkpoint does not.
    CheckpointHeldUp {
        message: String,
        /// The last step that the store has.
        durable_step: Option<u64>,
    },
    StepsLost {
        steps: u64,
        base_step: u64,
    },
    Recovered {
        generation: u64,
        after_ms: u64,
        phases: RecoveryPhases,
    },
    ManifestUnusable {
        key: String,
        message: String,
    },
    StateMismatch {
        generation: u64,
    },
    /// The rank computes other bits than the training's others, and is kept out.
    NumericsMismatch {
        pod: String,
        node: String,
    },
}
