//! What a generation can start from without the store, and who may take part in it.

use super::rank::Rank;
use super::{Happening, Membership, Millis, PodUid, State};
use crate::config::GIVE_UP_IMAGE_ANNOTATION;
use crate::coordinator::manifest::Manifest;
use crate::coordinator::report::Blockage;
use std::collections::{BTreeMap, BTreeSet};
use vicuna_protocol::coordinator::{Cause, Holding, MemoryBase};
use vicuna_protocol::numerics::{difference, differs_in};

/// State that a generation can start from, and the ranks that hold it together.
pub(super) struct HeldState {
    pub step: u64,
    pub members: Vec<PodUid>,
    pub memory: MemoryBase,
}

impl Membership {
    /// What the candidates hold or, failing that, they together with those who are to leave: these are still here, and
    /// hand over what only they have.
    pub(super) fn held_state(&self, now: Millis, candidates: &[PodUid]) -> Option<HeldState> {
        let with = |members: Vec<PodUid>| {
            let (step, memory) = self.memory_base(&members)?;
            Some(HeldState { step, members, memory })
        };
        with(candidates.to_vec())
            .or_else(|| with([candidates, &self.leavers_with_memory(now, candidates)[..]].concat()))
    }

    /// The newest step that anybody has applied, if every block of it is with one of `candidates`:
    /// there already, or a step short of it with the finished gradient.
    ///
    /// Ranks of one generation are never further apart, since nobody begins a step before all have
    /// applied the last one; and whoever has applied a step knows that owner and twin of every block
    /// have its gradient. So this fails only when both are lost.
    fn memory_base(&self, candidates: &[PodUid]) -> Option<(u64, MemoryBase)> {
        let total = self.blocks?;
        let known = || self.ranks.values().filter_map(|rank| rank.holding.as_ref());
        let ahead = known().chain(&self.committed).max_by_key(|holding| holding.step)?;
        let offered = |pod: &PodUid| self.ranks.get(pod).and_then(|rank| rank.holding.as_ref());
        let holdings: Vec<Holding> = candidates
            .iter()
            .map(|pod| offered(pod).map_or_else(Holding::default, |holding| Holding { last: None, ..holding.clone() }))
            .collect();
        let covered = (0..total).all(|block| holdings.iter().any(|holding| holding.offers(ahead.step, block)));
        covered.then(|| {
            let base = MemoryBase { updates: ahead.updates, norm: ahead.norm, updated: ahead.updated, holdings };
            (ahead.step, base)
        })
    }

    /// Ranks that are to leave, or to be replaced, and hold state.
    fn leavers_with_memory(&self, now: Millis, staying: &[PodUid]) -> Vec<PodUid> {
        let leaving = self.ranks.iter().filter(|(pod, rank)| {
            rank.is_fit()
                && rank.holding.is_some()
                && !staying.contains(pod)
                && !self.is_gone(pod)
                && !self.is_late(now, pod)
        });
        leaving.map(|(pod, _)| pod.clone()).collect()
    }

    /// The class of the record or, where there is none, of the checkpoint that there is to go on from, and else of the rank
    /// that was fit first; empty where any will do. A record that left nothing to go on from binds nobody: another image may
    /// have come since.
    pub(super) fn numerics_class(&self) -> &str {
        if self.takes_any_class() {
            return "";
        }
        let between = matches!(self.state, State::Held { .. } | State::Planning(_));
        let holds = || self.ranks.values().any(|rank| rank.holding.is_some());
        let binds = !between || self.newest_manifest().is_some() || holds();
        let record = self.record.as_ref().filter(|_| binds);
        let recorded = record.map(|record| &record.numerics_class).filter(|class| !class.is_empty());
        let stored =
            || self.newest_manifest().map(|manifest| &manifest.numerics_class).filter(|class| !class.is_empty());
        let first = || {
            let fit = self.ranks.iter().filter(|(pod, rank)| rank.is_fit() && !self.is_gone(pod));
            fit.min_by_key(|(_, rank)| rank.order).map(|(_, rank)| &rank.numerics_class)
        };
        recorded.or_else(stored).or_else(first).map_or("", String::as_str)
    }

    /// The checkpoint that a generation would start from now.
    pub(super) fn newest_manifest(&self) -> Option<&Manifest> {
        let history = self.record.as_ref().map_or(&[][..], |record| &record.history);
        self.manifests.newest_valid(self.issued(), history)
    }

    pub(super) fn takes_any_class(&self) -> bool {
        !self.reproducibility.is_exact() || self.target.is_some_and(|target| target.any_class)
    }

    /// What is in a rank's way, as far as we know; `class` is the training's.
    pub(super) fn obstacle_of(rank: &Rank, class: &str) -> Option<Blockage> {
        let differs = rank.prepared && !class.is_empty() && rank.numerics_class != class;
        let message = if rank.mismatched {
            "it computes other bits than the training's other ranks, from the same state".to_owned()
        } else if differs {
            format!("its numerics class is not the training's: {}", difference(&rank.numerics_class, class))
        } else {
            return rank.blocked.clone();
        };
        let what_to_do = if !rank.mismatched && differs_in("program", &rank.numerics_class, class) {
            format!(
                "the content of its image is not what it was: annotate the training with {GIVE_UP_IMAGE_ANNOTATION}=IMAGE, the one that its status.image names, and ranks that show that they compute the same bits join, or run the former content, named by its digest"
            )
        } else {
            "give the pools nodes of the kind that the training began on, or train anew with recipe.reproducibility Fast if the last bits do not matter".to_owned()
        };
        let message = format!("{message}; it is kept out, because weights would not be exact; {what_to_do}");
        Some(Blockage { cause: Cause::Numerics, message })
    }

    /// Ranks that came from the same base to other bits than most of those that trained before, or than the first of
    /// them in rank order: newcomers have no say where anyone did.
    pub(super) fn keep_out_who_differs(&mut self, ready: &BTreeMap<PodUid, String>, holders: &BTreeSet<PodUid>) {
        let has_a_say = |pod: &PodUid| holders.is_empty() || holders.contains(pod);
        let votes = |digest: &String| ready.iter().filter(|(pod, other)| has_a_say(pod) && *other == digest).count();
        let members = self.members().to_vec();
        let said: Vec<(&PodUid, &String)> =
            members.iter().filter_map(|member| Some((&member.pod_uid, ready.get(&member.pod_uid)?))).collect();
        // Of equals the first: it has been in the training for longest.
        let heard = said.iter().rev().filter(|(pod, _)| has_a_say(pod));
        let right = heard.max_by_key(|(_, digest)| votes(digest)).map(|(_, digest)| (*digest).clone());
        for (pod, digest) in said {
            if Some(digest) == right.as_ref() {
                continue;
            }
            if let Some(rank) = self.ranks.get_mut(pod) {
                rank.mismatched = true;
                let (pod, node) = (rank.pod_name.clone(), rank.node.clone());
                self.happened(Happening::NumericsMismatch { pod, node });
            }
        }
    }
}
