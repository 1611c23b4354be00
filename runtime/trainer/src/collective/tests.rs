use super::tcp::{Membership, Peer};
use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

fn networks(world: usize) -> (Vec<Network>, Vec<Peer>) {
    let networks: Vec<Network> = (0..world).map(|_| Network::listen("127.0.0.1:0").unwrap()).collect();
    let peers = networks
        .iter()
        .enumerate()
        .map(|(rank, network)| Peer { name: format!("rank-{rank}"), address: network.address().to_string() });
    let peers = peers.collect();
    (networks, peers)
}

fn membership(rank: usize, members: &[Peer], key: u8) -> Membership {
    Membership { generation: 3, rank, members: members.to_vec(), key: [key; 32] }
}

/// Runs `body` as every rank, each in a thread of its own.
fn on_ranks<T: Send>(networks: &[Network], members: &[Peer], body: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = |rank: usize| {
            let network = &networks[rank];
            let body = &body;
            scope.spawn(move || {
                let abort = CancellationToken::new();
                let membership = membership(rank, members, 1);
                body(Mesh::connect(network, &membership, 1 << 20, PATIENCE, &abort).unwrap())
            })
        };
        let threads: Vec<_> = (0..networks.len()).map(run).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn tag(step: u64) -> Tag {
    Tag::new(Kind::Partial, step)
}

#[test]
fn every_rank_reaches_every_other_in_any_order() {
    let (networks, members) = networks(4);
    let never = CancellationToken::new();
    let sums = on_ranks(&networks, &members, |mesh| {
        for step in [2, 1] {
            mesh.broadcast(tag(step), &[mesh.rank() as u8, step as u8]).unwrap();
        }
        let others = (0..4).filter(|rank| *rank != mesh.rank());
        let sum: u32 = others
            .flat_map(|from| [1, 2].map(|step| mesh.receive(from, tag(step), &never).unwrap()))
            .map(|payload| u32::from(payload[0]) * 10 + u32::from(payload[1]))
            .sum();
        mesh.leave();
        sum
    });
    assert_eq!(sums, [129, 109, 89, 69]);
}

#[test]
fn a_lost_peer_is_named() {
    let (networks, members) = networks(2);
    let errors = on_ranks(&networks, &members, |mesh| {
        (mesh.rank() == 0).then(|| mesh.receive(1, tag(1), &CancellationToken::new()).unwrap_err())
    });
    let error = errors[0].clone().unwrap();
    assert!(matches!(&error, CollectiveError::Lost { peer, .. } if peer == "rank-1"), "{error}");
}

#[test]
fn one_who_leaves_in_peace_is_missed_only_where_something_was_due() {
    let (networks, members) = networks(3);
    on_ranks(&networks, &members, |mesh| {
        let never = CancellationToken::new();
        match mesh.rank() {
            0 => {
                let due = mesh.receive(1, tag(9), &never).unwrap_err();
                assert!(matches!(due, CollectiveError::Lost { .. }), "{due}");
                mesh.send(2, tag(1), b"still here").unwrap();
                assert_eq!(mesh.receive(2, tag(1), &never).unwrap(), b"so am I");
            }
            1 => mesh.leave(),
            _ => {
                assert_eq!(mesh.receive(0, tag(1), &never).unwrap(), b"still here");
                mesh.send(0, tag(1), b"so am I").unwrap();
                mesh.leave();
            }
        }
    });
}

#[test]
fn a_stranger_without_the_key_is_not_let_in() {
    let (networks, members) = networks(2);
    let abort = CancellationToken::new();
    std::thread::scope(|scope| {
        let honest = scope.spawn(|| {
            let mine = membership(0, &members, 1);
            Mesh::connect(&networks[0], &mine, 1 << 20, Duration::from_secs(1), &abort).unwrap_err()
        });
        let wrong = membership(1, &members, 2);
        let refused = Mesh::connect(&networks[1], &wrong, 1 << 20, Duration::from_millis(500), &abort);
        let error = refused.unwrap_err();
        assert!(matches!(&error, CollectiveError::Connect { peer, .. } if peer == "rank-0"), "{error}");
        let error = honest.join().unwrap();
        assert!(matches!(&error, CollectiveError::Connect { peer, .. } if peer == "rank-1"), "{error}");
    });
}

#[test]
fn abort_ends_a_wait() {
    let (networks, members) = networks(2);
    let abort = CancellationToken::new();
    let connected = std::sync::Barrier::new(3);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                let (networks, members, abort, connected) = (&networks, &members, &abort, &connected);
                scope.spawn(move || {
                    let mine = membership(rank, members, 1);
                    let mesh = Mesh::connect(&networks[rank], &mine, 1 << 20, PATIENCE, abort).unwrap();
                    connected.wait();
                    mesh.receive(1 - rank, tag(1), &CancellationToken::new()).unwrap_err()
                })
            })
            .collect();
        connected.wait();
        abort.cancel();
        for rank in ranks {
            let error = rank.join().unwrap();
            assert!(matches!(error, CollectiveError::Aborted | CollectiveError::Lost { .. }), "{error}");
        }
    });
}

/// Forwards both ways and flips one bit of the payload on the way to the listener.
fn tampering_proxy(target: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for inbound in listener.incoming().flatten() {
            let outbound = TcpStream::connect(&target).unwrap();
            let (mut back_in, mut back_out) = (outbound.try_clone().unwrap(), inbound.try_clone().unwrap());
            std::thread::spawn(move || {
                drop(std::io::copy(&mut back_in, &mut back_out));
                drop(back_out.shutdown(std::net::Shutdown::Both));
            });
            forward_with_a_flip(inbound, outbound);
        }
    });
    address
}

fn forward_with_a_flip(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if let Some(at) = buffer[..count].windows(6).position(|window| window == b"weight") {
            buffer[at] ^= 1;
        }
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

#[test]
fn a_frame_changed_on_the_way_is_refused() {
    let (networks, mut members) = networks(2);
    members[0].address = tampering_proxy(members[0].address.clone());
    let never = CancellationToken::new();
    let results = on_ranks(&networks, &members, |mesh| match mesh.rank() {
        0 => {
            assert_eq!(mesh.receive(1, tag(1), &never).unwrap(), b"untouched");
            Some(mesh.receive(1, tag(2), &never).unwrap_err())
        }
        _ => {
            mesh.send(0, tag(1), b"untouched").unwrap();
            mesh.send(0, tag(2), b"weights").unwrap();
            drop(mesh.receive(0, tag(3), &never));
            None
        }
    });
    assert_eq!(results[0], Some(CollectiveError::Forged { peer: "rank-1".to_owned() }));
}

#[test]
fn more_than_a_step_holds_is_a_breach() {
    let (networks, members) = networks(2);
    let results = on_ranks(&networks, &members, |mesh| match mesh.rank() {
        0 => Some(mesh.receive(1, tag(99), &CancellationToken::new()).unwrap_err()),
        _ => {
            let chunk = vec![0; 300 << 10];
            (0..4).for_each(|step| drop(mesh.send(0, tag(step), &chunk)));
            drop(mesh.receive(0, tag(1), &CancellationToken::new()));
            None
        }
    });
    let error = results[0].clone().unwrap();
    assert!(matches!(error, CollectiveError::Protocol { .. }), "{error}");
}
