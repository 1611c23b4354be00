//! For unit tests of this crate.

/// A client that no server answers.
pub(crate) fn dead_client() -> kube::Client {
    let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
        Err::<http::Response<kube::client::Body>, _>(std::io::Error::other("no server in unit tests"))
    });
    kube::Client::new(service, "default")
}

/// `VICUNA_SEEDS` says which seeds are run instead of `0..usual`: a number of them, a range `FROM..TO`, or with `=SEED` a
/// single one, as a failing run names it.
pub(crate) fn seeds(usual: u64) -> std::ops::Range<u64> {
    match std::env::var("VICUNA_SEEDS") {
        Ok(asked) => parse_seeds(&asked)
            .unwrap_or_else(|| panic!("VICUNA_SEEDS={asked}: give a number, a range FROM..TO, or =SEED for one")),
        Err(_) => 0..usual,
    }
}

fn parse_seeds(asked: &str) -> Option<std::ops::Range<u64>> {
    let seeds = if let Some(one) = asked.strip_prefix('=') {
        let one: u64 = one.parse().ok()?;
        one..one.checked_add(1)?
    } else if let Some((from, to)) = asked.split_once("..") {
        from.parse().ok()?..to.parse().ok()?
    } else {
        0..asked.parse().ok()?
    };
    (!seeds.is_empty()).then_some(seeds)
}

/// Whichever assertion fails in a seed's run, how to have it again is said.
pub(crate) struct Reproduce(pub String, pub u64);

impl Drop for Reproduce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: VICUNA_SEEDS=={} runs it alone", self.0, self.1);
        }
    }
}

#[test]
fn seeds_are_a_number_a_range_or_a_single_one() {
    assert_eq!(parse_seeds("2000"), Some(0..2_000));
    assert_eq!(parse_seeds("400..500"), Some(400..500));
    assert_eq!(parse_seeds("=7"), Some(7..8));
    for wrong in ["", "0", "5..5", "9..5", "seven", "=", "1..2..3"] {
        assert_eq!(parse_seeds(wrong), None, "{wrong}");
    }
}

/// Bits of the blocks that a rank of `world` keeps, as owner or twin.
pub(crate) fn kept(blocks: usize, rank: usize, world: usize) -> u8 {
    let keeps = |block: &usize| block % world == rank || (block + 1) % world == rank;
    (0..blocks).filter(keeps).map(|block| 1 << block).sum()
}

/// Blocks whose owner and twin both leave, among ranks that keep them in turn, and the rank that they go to: the first that
/// stays. None if nobody does.
pub(crate) fn heirs(blocks: usize, leaves: &[bool]) -> Vec<(usize, usize)> {
    let world = leaves.len();
    let Some(to) = leaves.iter().position(|leaves| !leaves) else { return Vec::new() };
    let orphaned = |block: &usize| leaves[block % world] && leaves[(block + 1) % world];
    (0..blocks).filter(orphaned).map(|block| (block, to)).collect()
}
