//! One protocol step at a time; whole runs are in `simulation.rs`.

use super::*;
use crate::coordinator::manifest::Manifest;
use wire::Cause;
use wire::progress::Next;
use wire::rank_message::Body as Said;

/// Of a checkpoint.
const STATE_BYTES: u64 = 40_000_000_000;

struct Fixture {
    membership: Membership,
    now: Millis,
    pods: BTreeMap<PodUid, PodFact>,
    effects: Vec<Effect>,
}

impl Fixture {
    fn new(min: usize, max: usize) -> Self {
        Self::with_record(None, min, max)
    }

    fn with_record(record: Option<Record>, min: usize, max: usize) -> Self {
        let now = 1_000_000;
        let mut fixture = Self {
            membership: Membership::new(now, Limits::default(), record, Counters::default()),
            now,
            pods: BTreeMap::new(),
            effects: Vec::new(),
        };
        fixture.apply(Event::Target(Target { min, max, suspend: false, any_class: false }));
        fixture
    }

    fn apply(&mut self, event: Event) -> &mut Self {
        let effects = self.membership.step(self.now, event);
        self.effects.extend(effects);
        self
    }

    fn say(&mut self, pod: &str, body: Said) -> &mut Self {
        self.apply(Event::Said(pod.to_owned(), body))
    }

    fn after(&mut self, ms: Millis) -> &mut Self {
        self.now += ms;
        // Ticks at which nothing happens are left out.
        self.membership.now = self.now;
        self.apply(Event::Tick)
    }

    fn join(&mut self, pod: &str, generation: u64) -> &mut Self {
        self.pods.entry(pod.to_owned()).or_default();
        self.sync();
        self.apply(Event::Joined(wire::Hello {
            pod_name: pod.to_owned(),
            pod_uid: pod.to_owned(),
            node: format!("node-of-{pod}"),
            peer_address: "10.0.0.1:7600".to_owned(),
            generation,
            step: 0,
            ..Default::default()
        }))
    }

    fn prepare(&mut self, pod: &str, manifests: Vec<Manifest>) -> &mut Self {
        let manifests = manifests.into_iter().map(Into::into).collect();
        let prepared = wire::Prepared { manifests, micro_batches: 8, steps: 100, blocks: 2, state_bytes: STATE_BYTES };
        self.say(pod, Said::Prepared(prepared))
    }

    fn ready(&mut self, pod: &str) -> &mut Self {
        let generation = self.membership.generation();
        self.say(pod, Said::Ready(wire::Ready { generation, state_digest: "same".to_owned() }))
    }

    fn progress(&mut self, pod: &str, step: u64) -> &mut Self {
        let generation = self.membership.generation();
        self.say(
            pod,
            Said::Progress(wire::Progress {
                generation,
                step,
                steps: 100,
                step_seconds: 1.0,
                loss: 2.0,
                ..Default::default()
            }),
        )
    }

    fn stopped(&mut self, pod: &str, step: u64, manifests: Vec<Manifest>) -> &mut Self {
        let generation = self.membership.generation();
        let manifests = manifests.into_iter().map(Into::into).collect();
        self.say(pod, Said::Stopped(wire::Stopped { generation, step, manifests, ..Default::default() }))
    }

    /// Stopped, with two blocks in a two-rank training: both ranks keep both.
    fn holds(&mut self, pod: &str, step: u64, advancing: u8) -> &mut Self {
        let generation = self.membership.generation();
        let holding = wire::Holding {
            step,
            updates: step,
            blocks: vec![0b11],
            advancing: vec![advancing],
            norm: step as f64,
            updated: true,
            ..Default::default()
        };
        let holding = Some(holding);
        self.say(pod, Said::Stopped(wire::Stopped { generation, step, holding, ..Default::default() }))
    }

    fn formation(&mut self) -> Formation {
        self.written();
        let formed = self.take().into_iter().filter_map(|effect| match effect {
            Effect::Form(formation) => Some(formation),
            _ => None,
        });
        formed.fold(None, |_, formation| Some(formation)).expect("a generation is formed")
    }

    fn sync(&mut self) -> &mut Self {
        self.apply(Event::Pods(self.pods.clone()))
    }

    fn lose(&mut self, pod: &str) -> &mut Self {
        self.pods.remove(pod);
        self.sync()
    }

    fn notice(&mut self, pod: &str, in_ms: Millis) -> &mut Self {
        let departure =
            Departure { source: "spot".to_owned(), deadline_ms: self.now + in_ms, hurry: true, reclaim: true };
        self.pods.insert(pod.to_owned(), PodFact { departure: Some(departure), ended: false });
        self.sync()
    }

    fn written(&mut self) -> &mut Self {
        self.apply(Event::RecordWritten)
    }

    fn take(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    fn phase(&self) -> Phase {
        self.membership.state.phase()
    }

    /// Two ranks, `a` and `b`, that train in generation 1.
    fn training(min: usize, max: usize) -> Self {
        let mut fixture = Self::new(min, max);
        fixture.join("a", 0).join("b", 0).prepare("a", vec![]).prepare("b", vec![]);
        fixture.after(30_000).written().ready("a").ready("b").progress("a", 1);
        assert_eq!(fixture.phase(), Phase::Steady);
        fixture.take();
        fixture
    }
}

fn manifest(generation: u64, step: u64) -> Manifest {
    let (key, numerics_class) = (format!("{generation}/{step}"), String::new());
    Manifest { step, generation, key, digest: "d".to_owned(), numerics_class }
}

fn record_of(effects: &[Effect]) -> Record {
    let records = effects.iter().filter_map(|effect| match effect {
        Effect::WriteRecord(record) => Some(record.clone()),
        _ => None,
    });
    records.fold(None, |_, record| Some(record)).expect("a record is written")
}

fn stops(effects: &[Effect]) -> Vec<(String, bool, Millis)> {
    let stop = |effect: &Effect| match effect {
        Effect::Send(pod, Body::Stop(stop)) => Some((pod.clone(), stop.planned, stop.time_left_ms)),
        _ => None,
    };
    effects.iter().filter_map(stop).collect()
}

fn forms(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Form(_)))
}

#[test]
fn no_rank_hears_of_a_generation_before_the_record_is_written() {
    let mut fixture = Fixture::new(2, 2);
    fixture.join("a", 0).join("b", 0).prepare("a", vec![]).prepare("b", vec![]);
    let effects = fixture.take();
    let record = record_of(&effects);
    assert_eq!((record.generation, record.members.len(), record.base.as_ref()), (1, 2, None));
    assert!(!forms(&effects));
    fixture.written();
    assert_eq!(record.purpose, Purpose::Train);
    let leavers = BTreeSet::new();
    let formation = Formation { record, memory: None, canary: true, leavers, between_interruptions_ms: 0 };
    assert_eq!(fixture.take().last(), Some(&Effect::Form(formation)));
    fixture.ready("a");
    assert!(fixture.take().is_empty());
    fixture.ready("b");
    let go = |pod: &str| Effect::Send(pod.to_owned(), Body::Go(wire::Go { generation: 1 }));
    assert_eq!(fixture.take(), [go("a"), go("b")]);
}

#[test]
fn fewer_than_min_ranks_wait() {
    let mut fixture = Fixture::new(2, 3);
    fixture.join("a", 0).prepare("a", vec![]).after(600_000);
    assert_eq!(fixture.phase(), Phase::Held);
    fixture.join("b", 0).prepare("b", vec![]);
    assert_eq!(fixture.phase(), Phase::Held, "a third may follow at once");
    fixture.after(2_000);
    assert_eq!(fixture.phase(), Phase::Planning);
}

#[test]
fn ranks_wait_for_more_where_so_few_have_too_little_memory() {
    let mut fixture = Fixture::new(1, 3);
    let estimated = |fits_from: u32| {
        let need = |ranks| wire::estimated::Need { ranks, host_bytes: 9, device_bytes: 0, fits: ranks >= fits_from };
        let settings = format!("recipe.maxLength to {fits_from}");
        let remedies = vec![wire::estimated::Remedy { settings, ranks: 1 }];
        Said::Estimated(wire::Estimated { needs: (1..=4).map(need).collect(), remedies })
    };
    fixture.join("a", 0).say("a", estimated(2)).prepare("a", vec![]).after(600_000);
    assert_eq!(fixture.phase(), Phase::Held);
    fixture.join("b", 0).say("b", estimated(1)).prepare("b", vec![]).after(2_000);
    assert_eq!(fixture.phase(), Phase::Planning);
    let fits: Vec<bool> = fixture.membership.report(fixture.now).memory.iter().map(|need| need.fits).collect();
    assert_eq!(fits, [false, true, true, true], "the smallest node decides");
    assert_eq!(fixture.membership.report(fixture.now).remedies[0].settings, "recipe.maxLength to 2", "and advises");
}

#[test]
fn a_reclaim_with_notice_loses_no_step_and_goes_on_without_the_rank() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).notice("a", 5_000);
    let effects = fixture.take();
    assert_eq!(stops(&effects), [("a".into(), true, 5_000), ("b".into(), true, 5_000)]);
    fixture.progress("b", 8).stopped("a", 8, vec![]).stopped("b", 8, vec![manifest(1, 8)]);
    let record = record_of(&fixture.take());
    assert_eq!((record.generation, record.base_step), (2, 8));
    assert_eq!(record.base, Some(manifest(1, 8)));
    assert_eq!(record.members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["b"]);
    fixture.written().ready("b").lose("a").after(1_000).progress("b", 9);
    let counters = fixture.membership.report(fixture.now).disruptions;
    assert_eq!((counters.notices, counters.reclaims, counters.lost_steps), (1, 1, 0));
    assert_eq!(counters.last_recovery_ms, Some(1_000));
}

#[test]
fn below_min_the_training_is_held_until_a_joiner_comes() {
    let mut fixture = Fixture::training(2, 2);
    fixture.notice("a", 5_000).stopped("a", 1, vec![manifest(1, 1)]).stopped("b", 1, vec![]);
    assert_eq!(fixture.phase(), Phase::Held);
    fixture.join("c", 0).prepare("c", vec![manifest(1, 1)]);
    let record = record_of(&fixture.take());
    assert_eq!(record.members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["b", "c"]);
}

#[test]
fn a_notice_that_is_taken_back_brings_the_rank_back() {
    let mut fixture = Fixture::training(1, 2);
    fixture.notice("a", 5_000).stopped("a", 1, vec![manifest(1, 1)]).stopped("b", 1, vec![]);
    fixture.written().ready("b").progress("b", 2).take();
    fixture.after(20_000);
    assert_eq!(fixture.phase(), Phase::Steady, "a stays on standby");
    fixture.pods.insert("a".into(), PodFact::default());
    fixture.sync();
    assert_eq!(stops(&fixture.take()).len(), 1);
    fixture.stopped("b", 3, vec![manifest(2, 3)]);
    assert_eq!(record_of(&fixture.take()).members.len(), 2);
}

#[test]
fn a_rank_that_vanishes_costs_the_steps_since_the_checkpoint() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 5);
    fixture.say(
        "a",
        Said::Checkpointed(wire::Checkpointed {
            generation: 1,
            manifest: Some(manifest(1, 4).into()),
            ..Default::default()
        }),
    );
    fixture.lose("b");
    assert_eq!(
        stops(&fixture.take()),
        [("a".to_owned(), false, 0)].into_iter().chain([("b".to_owned(), false, 0)]).collect::<Vec<_>>()
    );
    fixture.stopped("a", 5, vec![]);
    let effects = fixture.take();
    assert_eq!(record_of(&effects).base_step, 4);
    assert!(effects.contains(&Effect::Happened(Happening::StepsLost { steps: 1, base_step: 4 })));
    assert_eq!(fixture.membership.counters.notices, 0);
}

#[test]
fn every_quarter_of_the_steps_is_told_once() {
    let mut fixture = Fixture::training(1, 2);
    for step in [24, 25, 26, 60, 74, 75, 99, 100] {
        fixture.progress("a", step).progress("b", step);
    }
    let told = fixture.take().into_iter().filter_map(|effect| match effect {
        Effect::Happened(Happening::Milestone { step, steps: 100, loss: Some(2.0) }) => Some(step),
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), [25, 60, 75]);
}

#[test]
fn who_does_not_answer_in_five_seconds_is_out_and_later_replaced() {
    let mut fixture = Fixture::training(1, 3);
    fixture.join("c", 0).lose("c").apply(Event::Disconnected("b".into()));
    fixture.progress("a", 2).after(30_000).stopped("a", 2, vec![]);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.after(5_000);
    let record = record_of(&fixture.take());
    assert_eq!(record.members.len(), 1);
    assert!(fixture.membership.report(fixture.now).unresponsive.is_empty());
    fixture.after(15_000);
    assert!(fixture.membership.report(fixture.now).unresponsive.contains("b"));
}

#[test]
fn a_late_rank_of_an_older_generation_is_stale() {
    let mut fixture = Fixture::training(1, 2);
    fixture.lose("b").stopped("a", 1, vec![]).written().take();
    fixture.join("b", 1);
    let stale = Effect::Send("b".into(), Body::Stale(wire::Stale { generation: 1 }));
    assert!(fixture.take().contains(&stale));
    let generation = 1;
    fixture.say("b", Said::Progress(wire::Progress { generation, step: 50, ..Default::default() }));
    assert_ne!(fixture.membership.step, 50);
}

#[test]
fn an_evaluation_is_told_once_and_holds_off_the_alarm() {
    let mut fixture = Fixture::training(1, 2);
    let said = |step, loss| Said::Evaluated(wire::Evaluated { generation: 1, step, done: 1, total: 9, loss });
    let stall_ms = fixture.membership.limits.stall_ms;
    fixture.after(stall_ms - 1000).say("a", said(1, None)).after(stall_ms - 1000);
    assert_eq!(fixture.phase(), Phase::Steady, "it is under way");
    fixture.take();
    fixture.say("a", said(1, Some(2.5))).say("b", said(1, Some(2.5)));
    let report = EvaluationReport { step: 1, loss: 2.5 };
    let told = fixture.take().into_iter().filter(|effect| *effect == Effect::Happened(Happening::Evaluated(report)));
    assert_eq!(told.count(), 1);
    assert_eq!(fixture.membership.report(fixture.now).evaluation, Some(report));
    fixture.after(stall_ms + 1000);
    assert_eq!(fixture.phase(), Phase::Collecting);
}

#[test]
fn joiners_are_taken_in_through_a_planned_stop_once_a_step_is_made() {
    let mut fixture = Fixture::training(1, 3);
    fixture.join("c", 0).prepare("c", vec![]);
    assert!(stops(&fixture.take()).is_empty());
    fixture.after(2_000);
    assert_eq!(stops(&fixture.take()).len(), 2);
    fixture.stopped("a", 2, vec![manifest(1, 2)]).stopped("b", 2, vec![]);
    let record = record_of(&fixture.take());
    assert_eq!((record.members.len(), record.base_step), (3, 2));
}

#[test]
fn a_base_that_cannot_be_loaded_is_left_out() {
    let mut fixture = Fixture::new(1, 1);
    fixture.join("a", 0).prepare("a", vec![manifest(0, 3), manifest(0, 9)]);
    assert_eq!(record_of(&fixture.take()).base_step, 9);
    fixture.written();
    fixture.say(
        "a",
        Said::LoadFailed(wire::LoadFailed {
            generation: 1,
            manifest: Some(manifest(0, 9).into()),
            message: "digest differs".into(),
        }),
    );
    fixture.stopped("a", 0, vec![]).after(10_000);
    let record = record_of(&fixture.take());
    assert_eq!((record.generation, record.base_step), (2, 3));
}

#[test]
fn ranks_that_loaded_different_states_do_not_train() {
    let mut fixture = Fixture::new(2, 2);
    fixture.join("a", 0).join("b", 0).prepare("a", vec![]).prepare("b", vec![]).written();
    fixture.ready("a");
    fixture.say("b", Said::Ready(wire::Ready { generation: 1, state_digest: "other".into() }));
    assert_eq!(fixture.phase(), Phase::Collecting);
}

#[test]
fn a_new_leader_goes_on_when_every_member_says_hello() {
    let mut first = Fixture::training(1, 2);
    let record = first.membership.record.clone();
    first.take();
    let mut fixture = Fixture::with_record(record.clone(), 1, 2);
    fixture.pods = first.pods.clone();
    fixture.sync().join("a", 1);
    assert_eq!(fixture.phase(), Phase::Adopting);
    fixture.join("b", 1);
    assert_eq!(fixture.phase(), Phase::Steady);
    assert!(stops(&fixture.take()).is_empty());

    let mut fixture = Fixture::with_record(record, 1, 2);
    fixture.pods = first.pods.clone();
    fixture.sync().join("a", 1).after(10_000);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.stopped("a", 1, vec![manifest(1, 1)]).after(5_000);
    assert_eq!(record_of(&fixture.take()).generation, 2);
}

/// A new leader's membership of `a`, `b` and `c`, which train in generation 1; nobody has called yet.
fn taken_over() -> Fixture {
    let mut first = Fixture::new(1, 3);
    for pod in ["a", "b", "c"] {
        first.join(pod, 0).prepare(pod, vec![]);
    }
    first.written().ready("a").ready("b").ready("c").progress("a", 1);
    assert_eq!((first.phase(), first.membership.members().len()), (Phase::Steady, 3));
    let mut fixture = Fixture::with_record(first.membership.record.clone(), 1, 3);
    fixture.pods = first.pods.clone();
    fixture.sync();
    fixture
}

#[test]
fn a_new_leader_waits_as_long_as_members_call_one_after_another() {
    let mut fixture = taken_over();
    fixture.join("a", 1).after(9_000).join("b", 1).after(9_000);
    assert_eq!(fixture.phase(), Phase::Adopting);
    // Who calls again is no news.
    fixture.apply(Event::Disconnected("a".into())).join("a", 1).after(999);
    assert_eq!(fixture.phase(), Phase::Adopting);
    fixture.join("c", 1);
    assert_eq!(fixture.phase(), Phase::Steady);
    assert!(stops(&fixture.take()).is_empty());

    let mut fixture = taken_over();
    fixture.join("a", 1).after(9_000).join("b", 1).after(10_000);
    assert_eq!(fixture.phase(), Phase::Collecting, "c does not call any more");
}

#[test]
fn a_generation_that_breaks_under_a_new_leader_waits_for_who_did_not_call_yet() {
    let mut fixture = taken_over();
    fixture.join("a", 1).join("b", 1).holds("a", 1, 0).holds("b", 1, 0).after(9_000);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.join("c", 1);
    assert!(stops(&fixture.take()).iter().any(|(pod, ..)| pod == "c"), "it is told when it calls");
    fixture.holds("c", 1, 0);
    assert_eq!(fixture.formation().record.members.len(), 3);

    // Not for whom its peers have lost.
    let mut fixture = taken_over();
    let lost = wire::Stopped { generation: 1, step: 1, lost: vec!["c".into()], ..Default::default() };
    fixture.join("a", 1).join("b", 1).say("a", Said::Stopped(lost)).holds("a", 1, 0).holds("b", 1, 0).after(2_500);
    assert_eq!(fixture.formation().record.members.len(), 2);
    let mut fixture = taken_over();
    fixture.join("a", 1).join("b", 1).notice("c", 4_000).holds("a", 1, 0).holds("b", 1, 0).after(5_000);
    assert_eq!(fixture.formation().record.members.len(), 2, "nor beyond a notice");
}

#[test]
fn a_rank_that_went_while_nobody_led_does_not_cost_what_the_others_hold() {
    let mut fixture = taken_over();
    fixture.lose("b").after(8_000);
    assert_eq!(fixture.phase(), Phase::Adopting, "a and c may be about to call");
    fixture.join("a", 1).join("c", 1);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.prepare("a", vec![]).prepare("c", vec![]).holds("a", 1, 0).holds("c", 1, 0);
    let record = fixture.formation().record.clone();
    assert_eq!((record.members.len(), record.base_step, record.in_memory), (2, 1, true));
}

#[test]
fn a_lost_swap_reads_the_record_again_and_issues_a_higher_generation() {
    let mut fixture = Fixture::new(1, 1);
    fixture.join("a", 0).prepare("a", vec![]);
    let mut theirs = record_of(&fixture.take());
    theirs.generation = 5;
    theirs.members[0].pod_uid = "z".into();
    fixture.apply(Event::RecordConflict(Some(theirs))).after(60_000);
    assert_eq!(record_of(&fixture.take()).generation, 6);
}

#[test]
fn suspension_checkpoints_then_sends_everyone_home_and_resume_goes_on() {
    let mut fixture = Fixture::training(1, 2);
    fixture.apply(Event::Target(Target { min: 1, max: 2, suspend: true, any_class: false }));
    assert_eq!(stops(&fixture.take()).len(), 2);
    fixture.stopped("a", 4, vec![manifest(1, 4)]).stopped("b", 4, vec![]);
    assert_eq!(fixture.phase(), Phase::Stopped);
    let home = fixture.take().iter().filter(|effect| matches!(effect, Effect::Send(_, Body::Shutdown(_)))).count();
    assert_eq!(home, 2);
    for pod in ["a", "b"] {
        fixture.apply(Event::Disconnected(pod.into())).lose(pod);
    }
    fixture.apply(Event::Target(Target { min: 1, max: 2, suspend: false, any_class: false }));
    fixture.join("c", 0).prepare("c", vec![]).after(2_000);
    assert_eq!(record_of(&fixture.take()).base_step, 4);
}

#[test]
fn a_result_is_recorded_before_ranks_are_sent_home_and_stays() {
    let mut fixture = Fixture::training(1, 2);
    let finished =
        wire::Finished { generation: 1, step: 100, uri: "s3://b/result".into(), digest: "d".into(), loss: 1.0 };
    fixture.say("a", Said::Finished(finished));
    let effects = fixture.take();
    let record = record_of(&effects);
    assert_eq!(effects.len(), 1);
    fixture.written();
    assert_eq!(fixture.phase(), Phase::Finished);
    assert_eq!(fixture.take().len(), 2);
    fixture.lose("a").lose("b").after(60_000);
    assert_eq!(fixture.phase(), Phase::Finished);
    let again = Fixture::with_record(Some(record), 1, 2);
    assert_eq!(again.phase(), Phase::Finished);
}

#[test]
fn a_blocked_rank_is_reported_and_no_candidate_until_it_is_prepared() {
    let mut fixture = Fixture::new(1, 1);
    fixture.join("a", 0);
    let cause = Cause::Store.into();
    fixture.say("a", Said::Blocked(wire::Blocked { cause, message: "no bucket".into(), behind: false }));
    fixture.after(60_000);
    assert_eq!(fixture.phase(), Phase::Held);
    let report = fixture.membership.report(fixture.now);
    assert_eq!(report.ranks["a"].blocked.as_ref().map(|it| it.message.as_str()), Some("no bucket"));
    fixture.prepare("a", vec![]);
    assert_eq!(fixture.phase(), Phase::Planning);
}

#[test]
fn a_cordoned_member_stays_until_its_replacement_is_there() {
    let mut fixture = Fixture::training(1, 2);
    let cordon = Departure { source: "cordon".into(), deadline_ms: 0, hurry: false, reclaim: false };
    fixture.pods.insert("a".into(), PodFact { departure: Some(cordon), ended: false });
    fixture.sync().after(60_000 / 3);
    assert!(stops(&fixture.take()).is_empty());
    fixture.progress("b", 2).join("c", 0).prepare("c", vec![]).after(2_000);
    fixture.stopped("a", 3, vec![manifest(1, 3)]).stopped("b", 3, vec![]);
    let record = record_of(&fixture.take());
    assert_eq!(record.members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["b", "c"]);
}

#[test]
fn writing_the_result_is_no_stall() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 99).after(29_000);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.progress("a", 100).after(1_200_000);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.after(600_000);
    assert_eq!(fixture.phase(), Phase::Collecting);
}

#[test]
fn a_checkpoint_shows_that_the_store_takes_what_every_rank_writes() {
    let mut fixture = Fixture::training(1, 2);
    let blocked = wire::Blocked { cause: Cause::Store.into(), message: "down".into(), behind: false };
    fixture.say("b", Said::Blocked(blocked));
    let blocked = |fixture: &Fixture| fixture.membership.report(fixture.now).ranks["b"].blocked.is_some();
    assert!(blocked(&fixture));
    let checkpointed =
        wire::Checkpointed { generation: 1, manifest: Some(manifest(1, 1).into()), ..Default::default() };
    fixture.say("a", Said::Checkpointed(checkpointed));
    assert!(!blocked(&fixture));
}

#[test]
fn a_planned_change_goes_on_from_memory() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).notice("a", 5_000);
    let leaves = |effect: &Effect| match effect {
        Effect::Send(pod, Body::Stop(stop)) => Some((pod.clone(), stop.leaves, stop.checkpoint)),
        _ => None,
    };
    let told: Vec<_> = fixture.take().iter().filter_map(leaves).collect();
    assert_eq!(told, [("a".into(), true, false), ("b".into(), false, false)]);
    fixture.holds("a", 8, 0).holds("b", 8, 0);
    let Formation { record, memory, canary, .. } = fixture.formation();
    assert_eq!((record.base_step, record.base, record.in_memory), (8, None, true));
    let memory = memory.unwrap();
    assert_eq!((memory.updates, memory.holdings.len()), (8, 1));
    assert!(!canary, "everybody has computed with the others before");
}

#[test]
fn too_few_to_hold_the_state_write_it_down() {
    let mut fixture = Fixture::training(2, 2);
    fixture.notice("a", 5_000);
    let saves = |effect: &Effect| matches!(effect, Effect::Send(_, Body::Stop(stop)) if stop.checkpoint);
    assert_eq!(fixture.take().iter().filter(|effect| saves(effect)).count(), 2);
}

#[test]
fn a_checkpoint_that_will_be_late_is_said_to_be_beforehand() {
    for (notice_ms, late) in [(10_000, true), (60_000, false)] {
        let mut fixture = Fixture::training(2, 2);
        let (manifest, generation) = (Some(manifest(1, 1).into()), 1);
        let (stall_seconds, upload_seconds) = (0.5, 20.0);
        let checkpointed =
            wire::Checkpointed { generation, manifest, stall_seconds, upload_seconds, ..Default::default() };
        fixture.say("a", Said::Checkpointed(checkpointed)).progress("a", 4).notice("b", notice_ms);
        let warned = fixture.take().into_iter().find_map(|effect| match effect {
            Effect::Happened(Happening::CheckpointWillBeLate { needs_ms, has_ms, durable_step, .. }) => {
                Some((needs_ms, has_ms, durable_step))
            }
            _ => None,
        });
        assert_eq!(warned, late.then_some((Some(20_500), 10_000, Some(1))));
    }
}

#[test]
fn fewer_ranks_need_longer_for_a_checkpoint_since_each_has_more_of_it() {
    let mut fixture = Fixture::training(2, 2);
    // Half of the state in 10 s.
    let (upload_seconds, bytes_written) = (10.0, STATE_BYTES / 2);
    let manifest = Some(manifest(1, 1).into());
    let checkpointed =
        wire::Checkpointed { generation: 1, manifest, upload_seconds, bytes_written, ..Default::default() };
    fixture.say("a", Said::Checkpointed(checkpointed)).progress("a", 4);
    assert_eq!(fixture.membership.checkpoint_ms(), Some(10_000));
    let mostly_there = wire::Checkpointed {
        generation: 1,
        manifest: Some(self::manifest(1, 2).into()),
        upload_seconds: 10.0,
        bytes_written: STATE_BYTES / 8,
        ..Default::default()
    };
    fixture.say("a", Said::Checkpointed(mostly_there));
    assert_eq!(fixture.membership.checkpoint_ms(), Some(10_000), "that it found the rest there makes it no slower");
    fixture.lose("b");
    assert_eq!(fixture.membership.checkpoint_ms(), Some(20_000));
}

#[test]
fn before_the_first_checkpoint_it_is_said_that_nothing_is_durable_yet() {
    let mut fixture = Fixture::training(2, 2);
    fixture.notice("b", 5_000);
    let warned = fixture.take().into_iter().find_map(|effect| match effect {
        Effect::Happened(late @ Happening::CheckpointWillBeLate { .. }) => Some(late),
        _ => None,
    });
    let Some(Happening::CheckpointWillBeLate { needs_ms, has_ms, bytes, durable_step }) = warned else {
        panic!("no warning");
    };
    assert_eq!((needs_ms, has_ms, durable_step, bytes), (None, 5_000, None, STATE_BYTES));
}

impl Fixture {
    /// Steps of a second from here on, until `to`; `next` is what ranks say comes after each.
    fn steps(&mut self, to: u64, next: Next) -> &mut Self {
        for step in self.membership.step + 1..=to {
            let generation = self.membership.generation();
            let progress = wire::Progress {
                generation,
                step,
                steps: 100,
                step_seconds: 1.0,
                next: next.into(),
                ..Default::default()
            };
            self.after(1_000).say("a", Said::Progress(progress));
        }
        self
    }

    /// … of a generation in which no step came in time: the stop is out.
    fn stalled(min: usize) -> Self {
        let mut fixture = Self::training(min, 2);
        fixture.steps(10, Next::Step).after(3_000);
        assert_eq!(fixture.phase(), Phase::Collecting);
        fixture.take();
        fixture
    }
}

#[test]
fn a_rank_that_hangs_is_missed_by_what_steps_took_and_a_pause_is_waited_for() {
    let mut fixture = Fixture::training(1, 2);
    fixture.steps(10, Next::Step).after(2_900);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.after(100);
    assert_eq!(fixture.phase(), Phase::Collecting);
    // Trainers of before do not say what comes next.
    for next in [Next::Pause, Next::Unspecified] {
        let mut fixture = Fixture::training(1, 2);
        fixture.steps(10, Next::Step).steps(11, next).after(29_900);
        assert_eq!(fixture.phase(), Phase::Steady, "{next:?}");
        fixture.after(100);
        assert_eq!(fixture.phase(), Phase::Collecting, "{next:?}");
    }
}

#[test]
fn after_a_step_that_took_longer_the_next_one_is_given_as_much() {
    let mut fixture = Fixture::training(1, 2);
    fixture.steps(20, Next::Step).after(2_900);
    let slow = wire::Progress {
        generation: 1,
        step: 21,
        steps: 100,
        step_seconds: 2.9,
        next: Next::Step.into(),
        ..Default::default()
    };
    fixture.say("a", Said::Progress(slow)).after(5_800);
    assert_eq!(fixture.phase(), Phase::Steady, "once and a half as long, and the slack");
    fixture.after(50);
    assert_eq!(fixture.phase(), Phase::Collecting);
}

#[test]
fn after_a_false_alarm_a_step_is_waited_for_twice_as_long() {
    let mut fixture = Fixture::stalled(1);
    fixture.holds("a", 10, 0).holds("b", 10, 0).written().ready("a").ready("b");
    fixture.steps(20, Next::Step).after(5_900);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.after(100);
    assert_eq!(fixture.phase(), Phase::Collecting);
}

#[test]
fn after_a_pause_of_our_own_what_was_said_meanwhile_is_heard_before_anybody_is_missed() {
    let mut fixture = Fixture::training(1, 2);
    fixture.steps(10, Next::Step);
    fixture.now += 8_000;
    fixture.apply(Event::Tick);
    assert_eq!(fixture.phase(), Phase::Steady, "steps that were made meanwhile are yet to be heard of");
    fixture.after(2_900);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.after(100);
    assert_eq!(fixture.phase(), Phase::Collecting);
}

#[test]
fn who_is_behind_and_answers_the_stop_does_not_hang() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("b", 1).steps(10, Next::Step).after(3_000);
    assert!(fixture.membership.ranks["b"].suspect_since.is_some());
    fixture.holds("a", 10, 0).holds("b", 10, 0);
    assert_eq!(fixture.membership.false_alarms, 1);
    assert_eq!(fixture.formation().record.members.len(), 2);
    fixture.after(60_000);
    assert!(fixture.membership.report(fixture.now).unresponsive.is_empty(), "its pod stays");
}

#[test]
fn who_hangs_is_waited_for_shortly_and_may_come_back_anew() {
    let mut fixture = Fixture::stalled(1);
    fixture.holds("a", 10, 0).after(1_400);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.after(100).written();
    let record = fixture.membership.record.clone().unwrap();
    assert_eq!((record.generation, record.members.len(), record.base_step), (2, 1, 10));
    fixture.take();
    let late = wire::Stopped { generation: 1, step: 10, ..Default::default() };
    fixture.say("b", Said::Stopped(late));
    let stale = Effect::Send("b".to_owned(), Body::Stale(wire::Stale { generation: 1 }));
    assert_eq!(fixture.take(), [stale]);
    assert_eq!(fixture.membership.false_alarms, 1, "it only took longer");
    fixture.join("b", 0).after(60_000);
    assert!(fixture.membership.report(fixture.now).unresponsive.is_empty(), "its pod stays");
}

#[test]
fn who_answers_late_takes_part_with_what_it_holds_while_nobody_has_gone_on() {
    let mut fixture = Fixture::stalled(2);
    fixture.holds("a", 10, 0).after(2_000);
    assert_eq!(fixture.phase(), Phase::Collecting, "one alone cannot go on");
    fixture.after(3_500);
    assert_eq!(fixture.phase(), Phase::Held);
    fixture.holds("b", 10, 0).after(2_000);
    let Formation { record, memory, .. } = fixture.formation();
    assert_eq!((record.members.len(), record.base_step, memory.is_some()), (2, 10, true));
}

#[test]
fn all_ranks_hear_at_once_and_once_when_one_of_them_is_about_to_go() {
    let mut fixture = Fixture::training(1, 2);
    fixture.notice("a", 60_000).after(500).notice("a", 59_000);
    let heard: Vec<_> = fixture
        .take()
        .into_iter()
        .filter_map(|effect| match effect {
            Effect::Send(pod, Body::Noticed(noticed)) => Some((pod, noticed.pod_name, noticed.time_left_ms)),
            _ => None,
        })
        .collect();
    assert_eq!(heard, ["a", "b"].map(|pod| (pod.to_owned(), "a".to_owned(), 60_000)));
    assert_eq!(fixture.phase(), Phase::Steady, "it trains on");
}

#[test]
fn interruptions_shorten_what_a_generation_is_told_of_the_time_between_them() {
    let mut fixture = Fixture::training(1, 2);
    fixture.membership.began_at = fixture.now - 600_000;
    let told = |fixture: &mut Fixture| fixture.formation().between_interruptions_ms;
    fixture.notice("b", 0).holds("a", 1, 0).holds("b", 1, 0);
    assert_eq!(told(&mut fixture), 600_000);
    fixture.lose("b").join("c", 0).prepare("c", vec![]).ready("a").progress("a", 2).after(30_000);
    fixture.holds("a", 2, 0);
    assert_eq!(told(&mut fixture), 630_000 / 2);
}

#[test]
fn a_lost_rank_costs_no_step_and_who_is_behind_follows() {
    let mut fixture = Fixture::training(1, 3);
    fixture.join("c", 0).prepare("c", vec![]).after(30_000).holds("a", 2, 0).holds("b", 2, 0).written();
    fixture.ready("a").ready("b").ready("c").progress("a", 5).take();
    // c applied step 6 before it told anyone; b has not.
    fixture.lose("a").holds("c", 6, 0).holds("b", 5, 0b11);
    let Formation { record, memory, .. } = fixture.formation();
    assert_eq!((record.base_step, record.members.len()), (6, 2));
    let memory = memory.unwrap();
    assert_eq!((memory.norm, memory.updated), (6.0, true));
    assert_eq!(fixture.membership.counters.lost_steps, 0);
}

#[test]
fn a_block_that_nobody_holds_falls_back_to_the_newest_checkpoint() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 5).lose("a").holds("b", 4, 0b01);
    // b could follow with one block only, and nobody says that step 5 was committed elsewhere: it holds 4.
    assert_eq!(fixture.formation().record.base_step, 4);
    let mut fixture = Fixture::training(1, 2);
    let holding = wire::Holding { step: 5, blocks: vec![0b01], ..Default::default() };
    fixture.lose("a").say(
        "b",
        Said::Stopped(wire::Stopped {
            generation: 1,
            step: 5,
            holding: Some(holding),
            manifests: vec![manifest(1, 3).into()],
            ..Default::default()
        }),
    );
    let record = fixture.formation().record;
    assert_eq!((record.base_step, record.in_memory), (3, false));
    assert_eq!(fixture.membership.counters.lost_steps, 2);
}

#[test]
fn whom_a_peer_has_lost_is_not_waited_for_to_the_end() {
    let mut fixture = Fixture::training(1, 2);
    let lost = vec!["b".to_owned()];
    fixture.say("a", Said::Stopped(wire::Stopped { generation: 1, step: 1, lost, ..Default::default() }));
    fixture.after(2_000);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.after(500);
    assert_eq!(fixture.phase(), Phase::Planning);
}

#[test]
fn whose_stream_is_broken_too_is_not_waited_for_at_all_where_others_have_what_it_held() {
    for (holding, phase) in [(0b11, Phase::Planning), (0b01, Phase::Collecting)] {
        let mut fixture = Fixture::training(1, 2);
        let holding = wire::Holding { step: 1, updates: 1, blocks: vec![holding], ..Default::default() };
        let (holding, lost) = (Some(holding), vec!["b".to_owned()]);
        fixture.say("a", Said::Stopped(wire::Stopped { generation: 1, step: 1, lost, holding, ..Default::default() }));
        assert_eq!(fixture.phase(), Phase::Collecting);
        fixture.apply(Event::Disconnected("b".to_owned()));
        assert_eq!(fixture.phase(), phase);
    }
}

#[test]
fn a_loss_without_a_leader_is_a_recovery_counted_from_the_last_step() {
    let mut first = Fixture::training(1, 2);
    let record = first.membership.record.clone();
    let mut fixture = Fixture::with_record(record, 1, 2);
    fixture.pods = std::mem::take(&mut first.pods);
    fixture.lose("b");
    assert_eq!(fixture.phase(), Phase::Adopting, "a may be about to call");
    let since_step_ms = 7_000;
    let hello = wire::Hello { pod_uid: "a".into(), generation: 1, step: 5, since_step_ms, ..Default::default() };
    fixture.apply(Event::Joined(hello));
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.prepare("a", vec![]).holds("a", 5, 0).written().ready("a").take();
    fixture.after(1_000).progress("a", 6);
    let recoveries = fixture.take().into_iter().filter_map(|effect| match effect {
        Effect::Happened(Happening::Recovered { after_ms, .. }) => Some(after_ms),
        _ => None,
    });
    assert_eq!(recoveries.collect::<Vec<_>>(), [8_000]);
    assert_eq!(fixture.membership.counters.lost_steps, 0);
}

#[test]
fn what_befalls_a_training_before_its_first_step_is_no_recovery() {
    let mut fixture = Fixture::new(1, 2);
    fixture.join("a", 0).join("b", 0).prepare("a", vec![]).prepare("b", vec![]);
    fixture.after(30_000).written().ready("a").lose("b").stopped("a", 0, vec![]);
    fixture.after(3_000).written().ready("a").progress("a", 1);
    assert_eq!(fixture.membership.step, 1);
    assert!(!fixture.take().iter().any(|it| matches!(it, Effect::Happened(Happening::Recovered { .. }))));
}

#[test]
fn a_rank_of_another_numerics_class_is_kept_out_by_name() {
    let mut fixture = Fixture::new(1, 3);
    let hello = |pod: &str, class: &str| wire::Hello {
        pod_name: pod.to_owned(),
        pod_uid: pod.to_owned(),
        numerics_class: class.to_owned(),
        ..Default::default()
    };
    for (pod, class) in [("a", "avx2"), ("b", "avx512"), ("c", "avx2")] {
        fixture.pods.insert(pod.to_owned(), PodFact::default());
        fixture.sync().apply(Event::Joined(hello(pod, class))).prepare(pod, vec![]);
    }
    fixture.after(2_000);
    let record = fixture.formation().record;
    assert_eq!(record.numerics_class, "avx2");
    assert_eq!(record.members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    let report = fixture.membership.report(fixture.now);
    let blocked = report.ranks["b"].blocked.clone().unwrap();
    assert!(blocked.message.contains("avx512") && blocked.message.contains("avx2"), "{}", blocked.message);
    assert!(report.ranks["a"].blocked.is_none());
}

#[test]
fn without_a_record_the_class_is_that_of_the_checkpoint_whoever_comes_first() {
    let stored = Manifest { numerics_class: "isa=avx512f; threads=1".to_owned(), ..manifest(1, 5) };
    let mut fixture = Fixture::new(1, 2);
    let arrive = |fixture: &mut Fixture, pod: &str, class: &str| {
        fixture.pods.insert(pod.to_owned(), PodFact::default());
        let hello = wire::Hello { pod_uid: pod.into(), numerics_class: class.into(), ..Default::default() };
        fixture.sync().apply(Event::Joined(hello)).prepare(pod, vec![stored.clone()]);
        fixture.after(30_000);
    };
    arrive(&mut fixture, "a", "isa=avx2; threads=1");
    assert_eq!(fixture.phase(), Phase::Held, "its weights would not be those of an undisturbed run");
    let blocked = fixture.membership.report(fixture.now).ranks["a"].blocked.clone().unwrap();
    assert!(blocked.message.contains("isa is avx2 instead of avx512f"), "{}", blocked.message);
    assert!(!blocked.message.contains("threads") && blocked.message.contains("Fast"), "{}", blocked.message);
    arrive(&mut fixture, "c", "program=2; isa=avx512f; threads=1");
    let blocked = fixture.membership.report(fixture.now).ranks["c"].blocked.clone().unwrap();
    assert!(blocked.message.contains("program is 2") && blocked.message.contains("give-up-image"), "{blocked:?}");
    fixture.lose("c");
    arrive(&mut fixture, "b", "isa=avx512f; threads=1");
    let record = fixture.formation().record;
    assert_eq!((record.members[0].pod_uid.as_str(), record.members.len()), ("b", 1));
    assert_eq!((record.base, record.numerics_class), (Some(stored.clone()), stored.numerics_class));
}

#[test]
fn the_class_of_a_record_that_left_nothing_to_go_on_from_binds_nobody() {
    let mut fixture = Fixture::new(1, 1);
    let arrive = |fixture: &mut Fixture, pod: &str, class: &str| {
        fixture.pods.insert(pod.to_owned(), PodFact::default());
        let hello = wire::Hello { pod_uid: pod.into(), numerics_class: class.into(), ..Default::default() };
        fixture.sync().apply(Event::Joined(hello)).prepare(pod, vec![]);
        fixture.after(30_000);
    };
    arrive(&mut fixture, "a", "program=1");
    assert_eq!(fixture.formation().record.numerics_class, "program=1");
    fixture.lose("a");
    arrive(&mut fixture, "b", "program=2");
    let record = fixture.formation().record;
    assert_eq!((record.members[0].pod_uid.as_str(), record.numerics_class.as_str()), ("b", "program=2"));
    assert!(fixture.membership.report(fixture.now).ranks["b"].blocked.is_none());
    fixture.ready("b").progress("b", 1).lose("b");
    arrive(&mut fixture, "c", "program=3");
    assert_eq!(fixture.formation().record.numerics_class, "program=3", "b took along what was made");
}

#[test]
fn where_bits_may_differ_ranks_of_any_class_train_together_and_prove_nothing() {
    let mut fixture = Fixture::new(1, 2);
    fixture.membership = fixture.membership.clone().reproducing(Reproducibility::Fast);
    for (pod, class) in [("a", "avx2"), ("b", "avx512")] {
        fixture.pods.insert(pod.to_owned(), PodFact::default());
        let hello = wire::Hello { pod_uid: pod.into(), numerics_class: class.into(), ..Default::default() };
        fixture.sync().apply(Event::Joined(hello)).prepare(pod, vec![]);
    }
    fixture.after(2_000);
    let Formation { record, canary, .. } = fixture.formation();
    assert!(record.members.len() == 2 && !canary && record.numerics_class.is_empty());
    assert!(fixture.membership.report(fixture.now).ranks.values().all(|rank| rank.blocked.is_none()));
}

#[test]
fn a_rank_that_computes_other_bits_is_kept_out() {
    let mut fixture = Fixture::new(1, 3);
    fixture.join("a", 0).join("b", 0).join("c", 0);
    fixture.prepare("a", vec![]).prepare("b", vec![]).prepare("c", vec![]);
    assert!(fixture.formation().canary);
    for (pod, digest) in [("a", "x"), ("b", "y"), ("c", "x")] {
        let ready = wire::Ready { generation: 1, state_digest: digest.to_owned() };
        fixture.say(pod, Said::Ready(ready));
    }
    let blamed = Happening::NumericsMismatch { pod: "b".to_owned(), node: "node-of-b".to_owned() };
    assert!(fixture.take().contains(&Effect::Happened(blamed)));
    for pod in ["a", "b", "c"] {
        fixture.stopped(pod, 0, vec![]);
    }
    let members = fixture.formation().record.members;
    assert_eq!(members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["a", "c"]);
}

#[test]
fn a_rank_that_is_kept_out_stops_nobody() {
    let mut fixture = Fixture::training(1, 3);
    let hello = wire::Hello { pod_uid: "c".into(), numerics_class: "avx512".into(), ..Default::default() };
    fixture.pods.insert("c".into(), PodFact::default());
    fixture.sync().apply(Event::Joined(hello)).prepare("c", vec![]).after(3_000).progress("a", 2).after(3_000);
    assert!(stops(&fixture.take()).is_empty());
    assert_eq!(fixture.phase(), Phase::Steady);
}

#[test]
fn steps_that_take_longer_with_fewer_ranks_are_waited_for() {
    let mut fixture = Fixture::training(1, 2);
    fixture.membership.step_ms = Some(20_000);
    fixture.lose("b").holds("a", 1, 0).written().ready("a");
    assert_eq!(fixture.membership.step_ms, Some(40_000), "one rank does what two did");
    fixture.after(199_000);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.after(1_000).holds("a", 1, 0).written().ready("a");
    assert_eq!((fixture.phase(), fixture.membership.stalls), (Phase::Steady, 1));
    fixture.after(399_000);
    assert_eq!(fixture.phase(), Phase::Steady, "twice as long after it was not long enough");
    fixture.progress("a", 2);
    assert_eq!(fixture.membership.stalls, 0);
}

#[test]
fn who_stands_still_and_answers_no_more_is_out_within_seconds() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 2).after(1_000).apply(Event::Disconnected("b".into())).after(1_999);
    assert_eq!(fixture.phase(), Phase::Steady, "streams break and come back");
    fixture.after(1_001);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.holds("a", 2, 0);
    assert_eq!(fixture.phase(), Phase::Planning, "a has what b held");
}

/// What `suspend` or a notice comes upon: `a` alone of two holds steps that the store does not have.
fn alone_below_min() -> Fixture {
    let mut fixture = Fixture::training(2, 2);
    fixture.progress("a", 5).lose("b").holds("a", 5, 0);
    assert_eq!(fixture.phase(), Phase::Held);
    fixture.take();
    fixture
}

fn saves(fixture: &mut Fixture, time_left_ms: Millis) {
    let Formation { record, memory, .. } = fixture.formation();
    assert!(record.purpose == Purpose::Save && memory.is_some());
    assert_eq!((record.base_step, record.members.len()), (5, 1));
    fixture.ready("a");
    let stop = |effect: &Effect| match effect {
        Effect::Send(_, Body::Stop(stop)) => Some((stop.planned, stop.checkpoint, stop.time_left_ms)),
        _ => None,
    };
    let effects = fixture.take();
    assert_eq!(effects.iter().filter_map(stop).collect::<Vec<_>>(), [(true, true, time_left_ms)]);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Send(_, Body::Go(_)))), "nobody trains");
    let (generation, base) = (record.generation, manifest(record.generation, 5));
    let holding = wire::Holding { step: 5, updates: 5, blocks: vec![0b11], ..Default::default() };
    let manifests = vec![base.into()];
    let stopped = wire::Stopped { generation, step: 5, manifests, holding: Some(holding), ..Default::default() };
    fixture.say("a", Said::Stopped(stopped));
}

#[test]
fn what_only_leavers_hold_is_written_down_when_too_few_are_left() {
    let mut fixture = alone_below_min();
    fixture.notice("a", 120_000);
    saves(&mut fixture, 120_000);
    assert_eq!(fixture.phase(), Phase::Held);
    fixture.lose("a").join("c", 0).join("d", 0).prepare("c", vec![]).prepare("d", vec![]).after(5_000);
    assert_eq!(fixture.formation().record.base_step, 5);
    assert_eq!(fixture.membership.counters.lost_steps, 0);
}

#[test]
fn a_suspension_that_comes_between_generations_writes_down_what_is_held() {
    let mut fixture = alone_below_min();
    fixture.apply(Event::Target(Target { min: 2, max: 2, suspend: true, any_class: false }));
    saves(&mut fixture, 0);
    assert_eq!(fixture.phase(), Phase::Stopped);
}

#[test]
fn a_deleted_record_costs_nothing_but_the_steps_since_the_checkpoint() {
    let mut fixture = Fixture::new(1, 1);
    fixture.join("a", 0).prepare("a", vec![manifest(7, 40)]);
    let record = record_of(&fixture.take());
    assert_eq!((record.generation, record.base_step), (8, 40));
}

#[test]
fn newcomers_do_not_outvote_who_trained() {
    let mut fixture = Fixture::training(1, 3);
    fixture.lose("b").holds("a", 1, 0).written().ready("a").progress("a", 2);
    fixture.join("c", 0).join("d", 0).prepare("c", vec![]).prepare("d", vec![]).after(3_000).holds("a", 3, 0);
    assert_eq!(fixture.formation().record.members.len(), 3);
    let generation = fixture.membership.generation();
    for (pod, digest) in [("a", "x"), ("c", "y"), ("d", "y")] {
        fixture.say(pod, Said::Ready(wire::Ready { generation, state_digest: digest.to_owned() }));
    }
    let kept_out = |pod: &str| fixture.membership.ranks[pod].mismatched;
    assert!(!kept_out("a") && kept_out("c") && kept_out("d"));
}

#[test]
fn a_checkpoint_that_waits_behind_the_training_is_told_once_and_keeps_nobody_out() {
    let mut fixture = Fixture::training(1, 2);
    let said = |message: &str| {
        Said::Blocked(wire::Blocked { cause: Cause::Store.into(), message: message.into(), behind: true })
    };
    fixture.say("b", said("away")).say("a", said("away")).say("b", said("full"));
    let told: Vec<_> = fixture.take().into_iter().filter(|it| matches!(it, Effect::Happened(_))).collect();
    let (message, durable_step) = ("away".to_owned(), None);
    assert_eq!(told, [Effect::Happened(Happening::CheckpointHeldUp { message, durable_step })]);
    let view = |fixture: &Fixture| fixture.membership.report(fixture.now).ranks["b"].clone();
    assert_eq!(view(&fixture).held_up.map(|it| it.message), Some("full".to_owned()));
    assert!(view(&fixture).blocked.is_none() && fixture.membership.ranks["b"].is_fit());
    // A stop waits for the same checkpoint: now the training does not go on.
    let waits = wire::Blocked { cause: Cause::Store.into(), message: "full".into(), behind: false };
    fixture.say("b", Said::Blocked(waits));
    assert!(view(&fixture).held_up.is_none() && view(&fixture).blocked.is_some());
    let checkpointed =
        wire::Checkpointed { generation: 1, manifest: Some(manifest(1, 1).into()), ..Default::default() };
    fixture.say("a", Said::Checkpointed(checkpointed));
    assert!(view(&fixture).held_up.is_none() && view(&fixture).blocked.is_none());
}

/// What a rank says that is stopped and holds both blocks.
fn hold_all(fixture: &mut Fixture, pods: &[&str], step: u64) {
    for pod in pods {
        fixture.holds(pod, step, 0);
    }
}

/// `a` and `b` hold everything and leave before a step of 10 s can end; `c` and `d` have just come.
fn leaving_too_soon() -> Fixture {
    let mut fixture = Fixture::training(2, 4);
    fixture.membership.step_ms = Some(10_000);
    fixture.join("c", 0).join("d", 0).prepare("c", vec![]).prepare("d", vec![]);
    fixture.notice("a", 5_000).notice("b", 6_000);
    fixture
}

#[test]
fn a_step_that_does_not_fit_its_notice_is_given_up_and_what_only_leavers_hold_is_handed_over() {
    let mut fixture = leaving_too_soon();
    assert_eq!(stops(&fixture.take()), [("a".into(), false, 5_000), ("b".into(), false, 5_000)]);
    hold_all(&mut fixture, &["a", "b"], 1);
    let Formation { record, leavers, canary, .. } = fixture.formation();
    assert_eq!((record.purpose, record.base_step, record.members.len()), (Purpose::HandOver, 1, 4));
    assert_eq!(leavers, ["a", "b"].map(str::to_owned).into());
    assert!(!canary, "nobody computes");
    fixture.ready("a").ready("b").ready("c").ready("d");
    let told = fixture.take();
    assert_eq!(stops(&told).iter().filter(|(_, planned, left)| *planned && *left == 5_000).count(), 4);
    assert!(!told.iter().any(|effect| matches!(effect, Effect::Send(_, Body::Go(_)))), "nobody trains");

    hold_all(&mut fixture, &["a", "b", "c", "d"], 1);
    let Formation { record, leavers, canary, .. } = fixture.formation();
    assert_eq!((record.purpose, record.in_memory, leavers.len()), (Purpose::Train, true, 0));
    assert_eq!(record.members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["c", "d"]);
    assert!(canary, "what newcomers hold was handed to them: they have yet to show that they compute alike");
    assert_eq!(fixture.membership.counters.lost_steps, 0);
}

#[test]
fn a_new_leader_ends_a_hand_over_once_all_have_done_their_part() {
    let mut first = leaving_too_soon();
    hold_all(&mut first, &["a", "b"], 1);
    let record = first.formation().record;
    assert_eq!(record.purpose, Purpose::HandOver);

    let membership = Membership::new(first.now, Limits::default(), Some(record), Counters::default());
    let mut fixture = Fixture { membership, now: first.now, pods: first.pods.clone(), effects: Vec::new() };
    fixture.apply(Event::Target(Target { min: 2, max: 4, suspend: false, any_class: false }));
    fixture.sync().join("a", 2).join("b", 2).join("c", 2).join("d", 2);
    assert_eq!(fixture.phase(), Phase::Moving);
    fixture.ready("a").ready("b").ready("c");
    assert_eq!(fixture.phase(), Phase::Moving, "d still takes over");
    fixture.ready("d");
    let told = fixture.take();
    assert_eq!(stops(&told).iter().filter(|(_, planned, left)| *planned && *left == 5_000).count(), 4);
    assert!(!told.iter().any(|effect| matches!(effect, Effect::Send(_, Body::Go(_)))), "nobody trains");
}

#[test]
fn a_hand_over_is_not_waited_for_when_the_first_rank_is_gone() {
    let mut fixture = leaving_too_soon();
    hold_all(&mut fixture, &["a", "b"], 1);
    fixture.written().ready("c").ready("d").after(4_999);
    assert_eq!(fixture.phase(), Phase::Moving);
    fixture.after(1);
    assert_eq!(fixture.phase(), Phase::Collecting);
    // b is there for another second, and has all; a is not waited for.
    hold_all(&mut fixture, &["b", "c", "d"], 1);
    assert_eq!(fixture.formation().record.members.len(), 2, "c and d have what came before");
}

#[test]
fn a_planned_stop_ends_in_time_to_hand_over_and_never_after_the_notice() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).notice("b", 5_000).after(2_999);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: true, .. }));
    fixture.after(1);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: false, .. }), "the step hangs");
    fixture.holds("a", 7, 0).after(1_999);
    assert_eq!(fixture.phase(), Phase::Collecting);
    fixture.after(1);
    assert_eq!(fixture.phase(), Phase::Planning, "b is gone by now");
    assert!(fixture.membership.ranks["b"].suspect_since.is_none(), "it was about to go");
}

#[test]
fn who_has_more_notice_than_leaving_takes_trains_on() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).notice("b", 30_000).after(10_000);
    assert!(fixture.phase() == Phase::Steady && stops(&fixture.take()).is_empty());
    assert!(fixture.membership.report(fixture.now).ranks["b"].leaving, "so that a replacement is looked for");
    // A step takes 1 s and handing over 2 s: twice that is kept.
    fixture.progress("a", 8).after(13_999);
    assert_eq!(fixture.phase(), Phase::Steady);
    fixture.after(1);
    assert_eq!(stops(&fixture.take()), [("a".into(), true, 6_000), ("b".into(), true, 6_000)]);
}

#[test]
fn a_replacement_that_comes_before_the_leaver_is_due_is_a_recovery_too() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).notice("b", 120_000);
    fixture.join("c", 0).prepare("c", vec![]).after(2_000).progress("a", 8);
    assert_eq!(stops(&fixture.take()), [("a".into(), true, 0), ("b".into(), true, 0)], "nothing presses");
    fixture.stopped("a", 8, vec![manifest(1, 8)]).stopped("b", 8, vec![]);
    let record = record_of(&fixture.take());
    assert_eq!(record.members.iter().map(|m| m.pod_uid.as_str()).collect::<Vec<_>>(), ["a", "c"]);
    fixture.written().ready("a").ready("c").after(1_500).progress("a", 9);
    assert_eq!(fixture.membership.report(fixture.now).disruptions.last_recovery_ms, Some(1_500));
}

#[test]
fn a_stop_without_a_deadline_does_not_wait_long_for_a_rank_that_hangs() {
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).apply(Event::Target(Target { min: 1, max: 2, suspend: true, any_class: false }));
    let stall_ms = fixture.membership.limits.stall_ms;
    fixture.after(stall_ms - 1);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: true, saves: true, .. }));
    fixture.after(1);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: false, .. }));
    // Once the last step is made, writing it down may take its time.
    let mut fixture = Fixture::training(1, 2);
    fixture.progress("a", 7).apply(Event::Target(Target { min: 1, max: 2, suspend: true, any_class: false }));
    let last = wire::Progress { generation: 1, step: 8, last_of_generation: true, ..Default::default() };
    fixture.say("a", Said::Progress(last)).after(1_700_000);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: true, .. }));
    // … which is known once it was done: not fivefold, and not without a word.
    let mut fixture = Fixture::training(1, 2);
    let saved = wire::Checkpointed {
        generation: 1,
        manifest: Some(manifest(1, 7).into()),
        stall_seconds: 10.0,
        upload_seconds: 30.0,
        ..Default::default()
    };
    fixture.progress("a", 7).say("a", Said::Checkpointed(saved));
    fixture.apply(Event::Target(Target { min: 1, max: 2, suspend: true, any_class: false }));
    fixture.say("a", Said::Progress(last)).after(199_999);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: true, .. }));
    fixture.after(60_000);
    assert!(matches!(fixture.membership.state, State::Collecting { planned: false, .. }), "somebody hangs");
}

#[test]
fn of_what_node_and_rank_say_the_notice_that_is_over_first_counts() {
    let mut fixture = Fixture::training(1, 2);
    let says =
        |time_left_ms| Said::Notice(wire::Notice { source: "SIGTERM".into(), time_left_ms, ..Default::default() });
    let left = |fixture: &Fixture| fixture.membership.departure("b").map(|it| it.deadline_ms - fixture.now);
    fixture.progress("a", 7).notice("b", 60_000).say("b", says(90_000));
    assert_eq!(left(&fixture), Some(60_000));
    fixture.say("b", says(20_000));
    assert_eq!(left(&fixture), Some(20_000));
    // An eviction that does not say by when.
    let departure = Departure { source: "evicted".into(), deadline_ms: 0, hurry: true, reclaim: true };
    fixture.pods.insert("b".to_owned(), PodFact { departure: Some(departure), ended: false });
    fixture.sync();
    assert_eq!(left(&fixture), Some(20_000));
}

#[test]
fn what_a_rank_has_left_of_its_notice_counts_by_our_clock() {
    let mut fixture = Fixture::training(1, 2);
    let notice =
        |time_left_ms| Said::Notice(wire::Notice { source: "SIGTERM".into(), time_left_ms, ..Default::default() });
    fixture.progress("a", 7).say("b", notice(30_000));
    assert_eq!(fixture.membership.departure("b").map(|it| it.deadline_ms), Some(fixture.now + 30_000));
    fixture.say("b", notice(0));
    assert_eq!(fixture.membership.departure("b").map(|it| it.deadline_ms), Some(0), "it does not know");
}
