//! A session stays with its worker; a request without one goes by load.

use super::least_loaded::LeastLoaded;
use super::{Candidate, Policy, Route, rendezvous};

#[derive(Clone, Copy, Debug, Default)]
pub struct Session;

impl Policy for Session {
    fn pick(&self, route: &Route, candidates: &[Candidate]) -> Option<u64> {
        match route.session {
            Some(session) => rendezvous::pick(session, candidates),
            None => LeastLoaded.pick(route, candidates),
        }
    }

    fn favourite(&self, route: &Route, candidates: &[Candidate]) -> Option<u64> {
        rendezvous::first(route.session?, candidates)
    }

    fn name(&self) -> &'static str {
        "session"
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidate;
    use super::*;

    #[test]
    fn a_session_has_one_worker_and_sessions_have_several() {
        let workers: Vec<_> = (0..4).map(|worker| candidate(worker, 0, 8)).collect();
        let pick = |session, draw| {
            let route = Route { prefix: draw, session, draw };
            Session.pick(&route, &workers).unwrap()
        };
        assert!((0..20).all(|draw| pick(Some(7), draw) == pick(Some(7), 0)));
        let used: std::collections::HashSet<_> = (0..50).map(|session| pick(Some(session * 7919), 0)).collect();
        assert!(used.len() > 1);
        assert_eq!(pick(None, 3), 0);
    }
}
