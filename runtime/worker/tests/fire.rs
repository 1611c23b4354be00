//! Streams of every kind while the workers behind them are killed: the cluster suite's checks, with processes alone.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where what it relies on is not there")]

mod served;

use served::{MODEL, Served, until};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;
use vicuna_tests::product::{Asked, Forced, References, Reply, VARIANTS, Variant, force};

/// Killings after which every kind of stream must have been moved at least once.
const ROUNDS: usize = 12;

/// Of a stream, before which it is not yet in its middle.
const CHUNKS: usize = 5;

/// To its end, whatever happens on the way; tells how many chunks there are so far.
fn reply(served: &Served, asked: &Asked, chunks: &AtomicUsize) -> Reply {
    let (mut stream, mut reply, mut last) =
        (asked.stream(served.http(), None).unwrap(), Reply::default(), Instant::now());
    while let Some(chunk) = stream.next_chunk().unwrap() {
        chunks.fetch_add(1, Relaxed);
        if reply.take(chunk, &mut last).unwrap() {
            chunks.store(usize::MAX, Relaxed);
            return reply;
        }
    }
    panic!("the stream of {asked:?} broke off after {reply:?}")
}

#[test]
fn streams_of_every_kind_are_the_undisturbed_ones_though_workers_are_killed() {
    let served = Served::start();
    let mut workers = vec![served.worker("home-0"), served.worker("home-1")];
    served.until_ready(2);
    let references = References::ask(served.http(), MODEL, &["Who are you?", "Count to ten."]).unwrap();
    let mut moved: BTreeMap<String, u64> = VARIANTS.iter().map(|variant| (format!("{variant:?}"), 0)).collect();
    let mut forced = Forced::default();
    for round in 0..ROUNDS {
        let chunks: Vec<AtomicUsize> = (0..references.len()).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            let streams: Vec<_> = chunks
                .iter()
                .enumerate()
                .map(|(number, chunks)| {
                    let (asked, reference) = references.get(number);
                    let served = &served;
                    (asked, reference, scope.spawn(move || reply(served, asked, chunks)))
                })
                .collect();
            until("all streams have begun", || chunks.iter().all(|chunks| chunks.load(Relaxed) >= CHUNKS));
            workers.remove(0).kill();
            workers.push(served.worker(&format!("home-{}", round + 2)));
            for (asked, reference, stream) in streams {
                let reply = stream.join().unwrap();
                assert_eq!(reply.difference(reference), None, "{:?}", asked.variant);
                *moved.entry(format!("{:?}", asked.variant)).or_default() += reply.resumes;
                if asked.variant == Variant::Scored {
                    forced.add(force(served.http(), MODEL, &asked.words, &reply).unwrap());
                }
            }
        });
        served.until_ready(2);
        if moved.values().all(|moves| *moves > 0) {
            break;
        }
    }
    println!("{moved:?}, {forced:?}");
    assert!(moved.values().all(|moves| *moves > 0), "not all were moved: {moved:?}");
    assert!(forced.likeliest > 100 * forced.ties, "{forced:?}");
}
