//! Lines that are not in the store yet go along with the state: newcomers have them before they count as members, for they
//! may be the ones who go on.

use super::Line;
use crate::collective::{CollectiveError, Kind, Tag};
use crate::step::{Engine, Peers};
use std::ops::Range;

/// Lines in a frame: well below its limit.
const CHUNK: usize = 4096;

/// The rank `from`, which has lines, gives them to those of `newcomers`.
pub fn hand_over(
    engine: &mut Engine,
    from: usize,
    newcomers: &[usize],
    peers: Peers<'_>,
) -> Result<(), CollectiveError> {
    let (rank, step) = (peers.collective.rank(), engine.step);
    if rank == from {
        return newcomers.iter().try_for_each(|to| send(engine.log.lines(), step, *to, peers));
    }
    if newcomers.contains(&rank) {
        engine.log.inherit(receive(step, from, peers)?);
        engine.has_lines = true;
    }
    Ok(())
}

fn tag(step: u64, part: usize) -> Tag {
    Tag::new(Kind::Log, step).block(part)
}

/// How many frames there are, and then these.
fn send(lines: &[Line], step: u64, to: usize, peers: Peers<'_>) -> Result<(), CollectiveError> {
    let chunks: Vec<&[Line]> = lines.chunks(CHUNK).collect();
    peers.collective.send(to, tag(step, 0), &(chunks.len() as u64).to_le_bytes())?;
    chunks.iter().enumerate().try_for_each(|(at, chunk)| {
        // Plain structs always serialise.
        peers.collective.send(to, tag(step, at + 1), &serde_json::to_vec(chunk).unwrap_or_default())
    })
}

fn receive(step: u64, from: usize, peers: Peers<'_>) -> Result<Vec<Line>, CollectiveError> {
    let malformed = || CollectiveError::Protocol { peer: format!("rank {from}"), detail: "lines of no log".to_owned() };
    let count = peers.collective.receive(from, tag(step, 0), peers.abort)?;
    let count = u64::from_le_bytes(count.try_into().map_err(|_| malformed())?);
    let parts: Range<usize> = 1..usize::try_from(count).map_err(|_| malformed())?.saturating_add(1);
    let mut lines = Vec::new();
    for part in parts {
        let payload = peers.collective.receive(from, tag(step, part), peers.abort)?;
        let chunk: Vec<Line> = serde_json::from_slice(&payload).map_err(|_| malformed())?;
        lines.extend(chunk);
    }
    Ok(lines)
}
