//! Whether what this rank has read is what the training began with. The job names data and base by URIs, and what lies
//! there may change while a training lasts: going on would skip samples, repeat them, or train adapters of another base.

use crate::collective::{CollectiveError, Kind, Tag};
use crate::generation::{GenerationError, Start};
use crate::prepare::{Session, Trouble};
use crate::step::Peers;
use std::collections::BTreeMap;
use vicuna_checkpoint::{Inputs, Manifest};
use vicuna_protocol::coordinator::Cause;
use vicuna_protocol::job::TrainingJob;

/// Letters of a digest that people are shown.
const SHORT: usize = 12;

/// All ranks must have the same. One that has something else says so and ends. The checkpoint that the generation starts
/// from is right, or those that hold the training's state; where neither says anything, most are.
pub fn agree(
    session: &Session,
    start: &Start,
    manifest: Option<&Manifest>,
    peers: Peers<'_>,
) -> Result<(), GenerationError> {
    let Peers { collective, abort } = peers;
    let tag = Tag::new(Kind::Inputs, start.step());
    // Plain structs of strings always serialise.
    collective.broadcast(tag, &serde_json::to_vec(&session.inputs).unwrap_or_default())?;
    let mut all = Vec::with_capacity(collective.world());
    for rank in 0..collective.world() {
        let own = rank == collective.rank();
        all.push(if own { session.inputs.clone() } else { decode(rank, &collective.receive(rank, tag, abort)?)? });
    }
    if let (Start::Manifest(base), Some(manifest)) = (start, manifest) {
        let whose = format!("the checkpoint {} has", session.store.uri_of(&base.key));
        compare(&session.job, &session.inputs, &manifest.inputs, &whose)?;
        all.retain(|inputs| difference(inputs, &manifest.inputs).is_none());
    }
    let right = match start {
        Start::Memory { .. } => &all[start.scribe()],
        Start::Model | Start::Manifest(_) => most(&all),
    };
    compare(&session.job, &session.inputs, right, "the training's other workers have")
}

fn decode(rank: usize, payload: &[u8]) -> Result<Inputs, CollectiveError> {
    let peer = || format!("rank {rank}");
    serde_json::from_slice(payload)
        .map_err(|error| CollectiveError::Protocol { peer: peer(), detail: error.to_string() })
}

/// What most ranks have; of equals, what the first has.
fn most(all: &[Inputs]) -> &Inputs {
    let mut votes: BTreeMap<&Inputs, usize> = BTreeMap::new();
    all.iter().for_each(|inputs| *votes.entry(inputs).or_default() += 1);
    let first_of_most = all.iter().rev().max_by_key(|inputs| votes[inputs]);
    first_of_most.unwrap_or(&all[0])
}

/// What was read otherwise than it should have been, and both digests; what one of the two does not know is not compared.
fn difference<'a>(found: &'a Inputs, expected: &'a Inputs) -> Option<(Cause, [&'a str; 2])> {
    let parts = [(Cause::Data, &found.data, &expected.data), (Cause::Model, &found.base, &expected.base)];
    parts.into_iter().find_map(|(cause, found, expected)| {
        let (found, expected) = found.as_deref().zip(expected.as_deref())?;
        (found != expected).then_some((cause, [found, expected]))
    })
}

/// Says it in words.
fn compare(job: &TrainingJob, found: &Inputs, expected: &Inputs, whose: &str) -> Result<(), GenerationError> {
    let Some((cause, digests)) = difference(found, expected) else { return Ok(()) };
    let (what, from) = match cause {
        Cause::Data => {
            let sets: Vec<&str> = job.dataset.iter().map(|set| set.from.as_str()).collect();
            ("the prepared data", sets.join(", "))
        }
        _ => ("the frozen base model", job.model.from.clone()),
    };
    let [found, expected] = digests.map(|digest| digest.chars().take(SHORT).collect::<String>());
    let message = format!(
        "{what} changed since the training began: this worker read {found} from {from}, and {whose} {expected}; put there what was there before, or start a new training with another checkpoint.to"
    );
    Err(GenerationError::Inputs(Trouble { cause, message }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(data: &str) -> Inputs {
        Inputs { data: Some(data.to_owned()), base: None }
    }

    #[test]
    fn most_ranks_are_right_and_of_equals_the_first() {
        assert_eq!(most(&["a", "b", "b"].map(inputs)), &inputs("b"));
        assert_eq!(most(&["b", "a"].map(inputs)), &inputs("b"));
    }
}
