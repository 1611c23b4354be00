//! The demo's path on a real cluster with a tiny model, and what happens when the input is bad.
//!
//! The steps build on each other and share one cluster, so this suite has its own main: it prints what a test
//! harness prints, goes on after a failure where it can, and always takes the cluster down.

#[path = "cluster/bad_input.rs"]
mod bad_input;
#[path = "cluster/browser.rs"]
mod browser;
#[path = "cluster/conformance.rs"]
mod conformance;
#[path = "cluster/fixture.rs"]
mod fixture;
#[path = "cluster/matrix/mod.rs"]
mod matrix;
#[path = "cluster/serving.rs"]
mod serving;
#[path = "cluster/training.rs"]
mod training;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use anyhow::{Result, anyhow};
use fixture::Fixture;

type Case = fn(&Fixture) -> Result<()>;

const CASES: &[(&str, Case)] = &[
    ("the_api_server_does_what_the_operator_relies_on", conformance::the_api_server_does_what_the_operator_relies_on),
    ("an_impossible_spec_is_rejected_with_a_sentence", bad_input::an_impossible_spec_is_rejected_with_a_sentence),
    ("every_sample_is_accepted", bad_input::every_sample_is_accepted),
    ("a_missing_dataset_is_told_and_recovers", bad_input::a_missing_dataset_is_told_and_recovers),
    ("refused_credentials_are_told_and_recover", bad_input::refused_credentials_are_told_and_recover),
    ("a_missing_secret_is_told_and_recovers", bad_input::a_missing_secret_is_told_and_recovers),
    ("an_unreadable_model_is_told_and_recovers", bad_input::an_unreadable_model_is_told_and_recovers),
    (
        "an_image_that_cannot_be_pulled_is_told_and_recovers",
        bad_input::an_image_that_cannot_be_pulled_is_told_and_recovers,
    ),
    ("a_missing_bucket_is_told", bad_input::a_missing_bucket_is_told),
    ("a_pod_that_fits_nowhere_is_told", bad_input::a_pod_that_fits_nowhere_is_told),
    (
        "a_reclaimed_run_has_the_weights_of_an_undisturbed_one",
        training::a_reclaimed_run_has_the_weights_of_an_undisturbed_one,
    ),
    ("a_rank_that_is_cut_off_takes_no_step_with_it", training::a_rank_that_is_cut_off_takes_no_step_with_it),
    (
        "a_suspended_training_gives_its_pods_back_and_goes_on",
        training::a_suspended_training_gives_its_pods_back_and_goes_on,
    ),
    ("the_operators_restart_costs_no_step", training::the_operators_restart_costs_no_step),
    ("the_result_is_served", serving::the_result_is_served),
    ("a_stream_survives_its_worker", serving::a_stream_survives_its_worker),
    ("replicas_follow_demand", serving::replicas_follow_demand),
    ("adapters_are_served_beside_their_base", serving::adapters_are_served_beside_their_base),
    ("the_chat_page_answers_in_a_browser", browser::the_chat_page_answers_in_a_browser),
];

fn main() {
    let (flags, parts): (Vec<_>, Vec<_>) = std::env::args().skip(1).partition(|word| word.starts_with('-'));
    let (all, failed) = if flags.iter().any(|flag| flag == "--matrix") { matrix::main(&parts) } else { cases(&parts) };
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored", all - failed);
    std::process::exit(i32::from(failed > 0));
}

/// Runs the cases whose names have one of the words, or all; gives how many there were and how many failed.
fn cases(parts: &[String]) -> (usize, usize) {
    let is_chosen = |name: &str| parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()));
    let chosen: Vec<_> = CASES.iter().filter(|(name, _)| is_chosen(name)).collect();
    println!("\nrunning {} tests", chosen.len());
    let failed = match Fixture::up() {
        Ok(fixture) => {
            let failed = chosen.iter().filter(|(name, case)| !passes(&fixture, name, *case)).count();
            fixture.down(failed > 0);
            failed
        }
        Err(error) => {
            println!("the cluster did not come up: {error:#}");
            Fixture::remove();
            chosen.len()
        }
    };
    (chosen.len(), failed)
}

fn passes(fixture: &Fixture, name: &str, case: Case) -> bool {
    let started = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| case(fixture))).unwrap_or_else(|_| Err(anyhow!("panicked")));
    let seconds = started.elapsed().as_secs_f64();
    match &outcome {
        Ok(()) => println!("test {name} ... ok ({seconds:.1} s)"),
        Err(error) => println!("test {name} ... FAILED ({seconds:.1} s)\n{error:?}\n{}", fixture.evidence()),
    }
    outcome.is_ok()
}
