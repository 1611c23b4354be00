//! Which worker takes a request: one policy a file.

pub mod ejection;
pub mod least_loaded;
pub mod power_of_two;
pub mod prefix_affinity;
mod rendezvous;
pub mod session;

use clap::ValueEnum;

/// A worker that could take the request: it offers the model, is not draining and may continue it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub worker: u64,
    /// Of its name, so that all gateways see the same.
    pub name_hash: u64,
    /// Sequences that this gateway has on it.
    pub assigned: u32,
    /// Sequences on it, from all gateways, as far as is known.
    pub used: u32,
    /// Sequences that it runs at the same time.
    pub slots: u32,
    /// Share of its room for keys and values that is taken.
    pub kv_used: f64,
    /// Tokens per second of one sequence, beside the fastest candidate: in (0, 1].
    pub speed: f64,
}

impl Candidate {
    /// No more is sent to a worker than it can run, so that what waits does so here, in order, and can
    /// still go to any worker.
    pub fn has_room(&self) -> bool {
        self.assigned < self.slots
    }

    /// How busy it would be with one more: 1 is full, for a worker of full speed.
    pub fn load(&self) -> f64 {
        let slots = (f64::from(self.used) + 1.0) / f64::from(self.slots.max(1));
        slots.max(self.kv_used) / self.speed
    }
}

/// What of a request matters for its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// Of the model and the beginning of the prompt.
    pub prefix: u64,
    /// Of what the client calls its session.
    pub session: Option<u64>,
    /// Drawn once a request.
    pub draw: u64,
}

pub trait Policy: Send + Sync {
    /// The worker to use, or none: then the request waits in the gateway's queue.
    fn pick(&self, route: &Route, candidates: &[Candidate]) -> Option<u64>;

    /// The worker that the request would go to if nobody were busy; none where the policy goes by load alone.
    fn favourite(&self, _route: &Route, _candidates: &[Candidate]) -> Option<u64> {
        None
    }

    fn name(&self) -> &'static str;
}

/// The policies by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicyName {
    /// The worker with most room, in slots and in keys and values, weighted by its speed.
    LeastLoaded,
    /// The less loaded of two drawn at random: gateways that do not talk avoid the same favourite.
    PowerOfTwo,
    /// Prompts that begin alike go to the same worker, unless it is much busier than the others.
    PrefixAffinity,
    /// A session stays with its worker, unless that is much busier than the others.
    Session,
}

impl PolicyName {
    pub fn policy(self) -> Box<dyn Policy> {
        match self {
            PolicyName::LeastLoaded => Box::new(least_loaded::LeastLoaded),
            PolicyName::PowerOfTwo => Box::new(power_of_two::PowerOfTwo),
            PolicyName::PrefixAffinity => Box::new(prefix_affinity::PrefixAffinity),
            PolicyName::Session => Box::new(session::Session),
        }
    }
}

/// The same on every gateway and in every version: FNV-1a, then SplitMix64's finish.
pub fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in parts {
        for byte in *part {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        // Between parts, so that ("ab", "c") is not ("a", "bc").
        hash = (hash ^ 0xff).wrapping_mul(0x0000_0100_0000_01b3);
    }
    mix(hash)
}

fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub fn candidate(worker: u64, used: u32, slots: u32) -> Candidate {
        let name_hash = hash(&[&worker.to_le_bytes()]);
        Candidate { worker, name_hash, assigned: used, used, slots, kv_used: 0.0, speed: 1.0 }
    }

    pub fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (0u32..9, 0u32..9, 1u32..9, 0.0f64..1.0, 0.05f64..1.0);
        prop::collection::vec(one, 0..12).prop_map(|all| {
            let candidate = |(worker, (assigned, others, slots, kv_used, speed)): (usize, _)| Candidate {
                assigned,
                used: assigned + others,
                kv_used,
                speed,
                ..candidate(worker as u64, 0, slots)
            };
            all.into_iter().enumerate().map(candidate).collect()
        })
    }

    pub fn routes() -> impl Strategy<Value = Route> {
        (any::<u64>(), any::<Option<u64>>(), any::<u64>()).prop_map(|(prefix, session, draw)| Route {
            prefix,
            session,
            draw,
        })
    }

    proptest! {
        #[test]
        fn every_policy_picks_a_worker_with_room_whenever_there_is_one(
            route in routes(), candidates in candidates()
        ) {
            let room: Vec<_> = candidates.iter().filter(|one| one.has_room()).map(|one| one.worker).collect();
            for name in PolicyName::value_variants() {
                match name.policy().pick(&route, &candidates) {
                    Some(worker) => prop_assert!(room.contains(&worker), "{name:?}"),
                    None => prop_assert!(room.is_empty(), "{name:?}"),
                }
            }
        }

        #[test]
        fn no_policy_depends_on_the_order_of_the_candidates(route in routes(), candidates in candidates()) {
            let mut turned = candidates.clone();
            turned.reverse();
            for name in [PolicyName::LeastLoaded, PolicyName::PrefixAffinity, PolicyName::Session] {
                let policy = name.policy();
                prop_assert_eq!(policy.pick(&route, &candidates), policy.pick(&route, &turned));
            }
        }
    }

    #[test]
    fn of_idle_workers_the_favourite_is_picked_where_there_is_one() {
        let idle: Vec<_> = (0..4).map(|worker| candidate(worker, 0, 8)).collect();
        let route = Route { prefix: 42, session: Some(7), draw: 1 };
        for name in PolicyName::value_variants() {
            let policy = name.policy();
            let favourite = policy.favourite(&route, &idle);
            assert_eq!(favourite.is_some(), matches!(name, PolicyName::PrefixAffinity | PolicyName::Session));
            assert!(favourite.is_none() || favourite == policy.pick(&route, &idle), "{name:?}");
            assert_eq!(name.to_possible_value().unwrap().get_name(), policy.name());
        }
        assert_eq!(PolicyName::Session.policy().favourite(&Route { session: None, ..route }, &idle), None);
    }

    #[test]
    fn parts_are_told_apart() {
        assert_ne!(hash(&[b"ab", b"c"]), hash(&[b"a", b"bc"]));
    }
}
