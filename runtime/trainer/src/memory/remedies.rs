//! What would fit where a recipe does not, worked out with the same estimate: advice that was not tried is none.

use super::Workload;
use super::limits::Limits;
use crate::adapters;
use crate::blocks::BlockTable;
use std::fmt;
use std::ops::RangeInclusive;
use vicuna_protocol::job::{Base, Lora, Method, Parameters, Precision, Recipe, Recompute};

/// A changed recipe that fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// Everything that has to be changed.
    pub changes: Vec<Change>,
    /// The fewest ranks with which it fits.
    pub ranks: u32,
}

/// One field of the recipe set to something else.
#[derive(Clone, Debug)]
pub struct Change {
    /// In a VicunaTraining.
    pub field: &'static str,
    pub value: String,
    /// Of `vicuna-trainer estimate`.
    pub option: String,
    apply: fn(&mut Recipe),
}

impl PartialEq for Change {
    fn eq(&self, other: &Self) -> bool {
        (self.field, &self.value) == (other.field, &other.value)
    }
}

impl Eq for Change {}

impl Change {
    fn new(field: &'static str, value: impl fmt::Display, option: impl Into<String>, apply: fn(&mut Recipe)) -> Self {
        Self { field, value: value.to_string(), option: option.into(), apply }
    }
}

/// What could be changed, the mildest first: what changes no bit of the result, then what changes little of it.
fn changes(recipe: &Recipe, gpu: bool) -> Vec<Change> {
    let half = recipe.max_length / 2;
    // Adapters cannot stretch their base.
    let is = |method: fn(&Method) -> bool| recipe.rope_scaling.is_none() && method(&recipe.method);
    let changes = [
        (
            gpu && !recipe.offload,
            Change::new("recipe.memory.offload", true, "--offload", |recipe| recipe.offload = true),
        ),
        (
            recipe.recompute == Recompute::Never,
            Change::new("recipe.memory.recompute", "Auto", "--recompute auto", |recipe| {
                recipe.recompute = Recompute::Auto;
            }),
        ),
        (
            recipe.parameters == Parameters::Replicated,
            Change::new("recipe.memory.parameters", "Auto", "--parameters auto", |recipe| {
                recipe.parameters = Parameters::Auto;
            }),
        ),
        (
            recipe.micro_batch > 1,
            Change::new("recipe.microBatch", 1, "--micro-batch 1", |recipe| recipe.micro_batch = 1),
        ),
        (
            half > 1,
            Change::new("recipe.maxLength", half, format!("--max-length {half}"), |recipe| recipe.max_length /= 2),
        ),
        (
            recipe.precision == Precision::Fp32,
            Change::new("recipe.precision", "Bf16", "--bf16", |recipe| recipe.precision = Precision::Bf16),
        ),
        (
            is(|method| *method == Method::Full),
            Change::new("recipe.method", "LoRA", "--method lora", |recipe| recipe.method = Method::LoRA(lora(recipe))),
        ),
        (
            is(|method| !matches!(method, Method::QLoRA(_, Base::Nf4))),
            Change::new("recipe.method", "QLoRA", "--method qlora", |recipe| {
                recipe.method = Method::QLoRA(lora(recipe), Base::Nf4);
            }),
        ),
    ];
    changes.into_iter().filter(|(sensible, _)| *sensible).map(|(_, change)| change).collect()
}

/// The adapters as they are, or those that are trained where nothing is said.
fn lora(recipe: &Recipe) -> Lora {
    recipe.method.lora().cloned().unwrap_or_default()
}

/// Every single change with which one of these numbers of ranks fits; else the mildest changes that do so together; none
/// where not even these would.
pub fn remedies(workload: &Workload<'_>, limits: Limits, ranks: RangeInclusive<u32>) -> Vec<Remedy> {
    let tried = |changes: &[Change]| -> Option<Remedy> {
        let mut recipe = workload.recipe.clone();
        changes.iter().for_each(|change| (change.apply)(&mut recipe));
        let table = BlockTable::of(workload.config, adapters::lora(&recipe.method).ok()?.as_ref());
        let changed = Workload { recipe: &recipe, table: &table, ..workload.clone() };
        let ranks = ranks.clone().find(|ranks| changed.need_within(*ranks, limits).fits(limits))?;
        Some(Remedy { changes: changes.to_vec(), ranks })
    };
    let all = changes(workload.recipe, workload.gpu);
    let single: Vec<Remedy> = all.iter().filter_map(|change| tried(std::slice::from_ref(change))).collect();
    if !single.is_empty() {
        return single;
    }
    let together = (2..=all.len()).map(|count| all[..count].to_vec()).find(|changes| tried(changes).is_some());
    let Some(mut needed) = together else { return Vec::new() };
    // What a later change made needless goes.
    let mut index = 0;
    while index < needed.len() {
        let change = needed.remove(index);
        if tried(&needed).is_none() {
            needed.insert(index, change);
            index += 1;
        }
    }
    tried(&needed).into_iter().collect()
}

impl Remedy {
    /// As options of `vicuna-trainer estimate`.
    pub fn options(&self) -> String {
        self.changes.iter().map(|change| change.option.as_str()).collect::<Vec<_>>().join(" ")
    }
}

/// As fields of a VicunaTraining.
impl fmt::Display for Remedy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changes = self.changes.iter().map(|Change { field, value, .. }| format!("{field} to {value}"));
        out.write_str(&changes.collect::<Vec<_>>().join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::recipe;
    use super::*;
    use vicuna_model::tiny;

    fn device(bytes: u64) -> Limits {
        Limits { device: Some(bytes), ..Limits::default() }
    }

    /// What one rank needs of a GPU at least, with these changes of a LLaMA-7B's recipe.
    fn need_bytes(recipe: &Recipe, changes: &[Change]) -> u64 {
        let mut recipe = recipe.clone();
        changes.iter().for_each(|change| (change.apply)(&mut recipe));
        let config = tiny::llama_7b();
        let table = BlockTable::of(&config, adapters::lora(&recipe.method).unwrap().as_ref());
        let workload =
            Workload { config: &config, table: &table, recipe: &recipe, gpu: true, data: 0, slow_store: true };
        workload.need_within(1, device(0)).device
    }

    fn found(recipe: &Recipe, limits: Limits, ranks: RangeInclusive<u32>) -> Vec<Remedy> {
        let config = tiny::llama_7b();
        let table = BlockTable::of(&config, adapters::lora(&recipe.method).unwrap().as_ref());
        remedies(
            &Workload { config: &config, table: &table, recipe, gpu: true, data: 0, slow_store: true },
            limits,
            ranks,
        )
    }

    fn said(remedies: &[Remedy]) -> Vec<String> {
        remedies.iter().map(|remedy| format!("{remedy}; {}", remedy.options())).collect()
    }

    #[test]
    fn what_is_advised_fits_and_the_mildest_is_first() {
        let whole = recipe(Method::Full, Precision::Bf16);
        let all = changes(&whole, true);
        let limit = need_bytes(&whole, &[]) - 1;
        let advice = found(&whole, device(limit), 1..=1);
        let enough = all.iter().filter(|change| need_bytes(&whole, std::slice::from_ref(change)) <= limit);
        assert_eq!(advice.iter().map(|remedy| &remedy.changes[0]).collect::<Vec<_>>(), enough.collect::<Vec<_>>());
        assert_eq!(said(&advice)[0], "recipe.memory.offload to true; --offload");
        assert_eq!(said(&advice).last().unwrap(), "recipe.method to QLoRA; --method qlora");
        assert!(found(&whole, device(1 << 20), 1..=8).is_empty(), "nothing fits into that");
    }

    #[test]
    fn a_quantised_job_is_not_told_to_quantise() {
        let job = recipe(Method::QLoRA(Lora::default(), Base::Nf4), Precision::Bf16);
        let advice = said(&found(&job, device(need_bytes(&job, &[]) - 1), 1..=1));
        assert!(!advice.is_empty() && advice.iter().all(|remedy| !remedy.contains("method")), "{advice:?}");
    }

    #[test]
    fn several_changes_are_named_where_no_single_one_is_enough_and_none_that_is_not_needed() {
        let heavy = Recipe {
            micro_batch: 8,
            recompute: Recompute::Never,
            ..recipe(Method::QLoRA(Lora::default(), Base::Int8), Precision::Fp32)
        };
        let single = |change| need_bytes(&heavy, std::slice::from_ref(change));
        let limit = changes(&heavy, true).iter().map(single).min().unwrap() - 1;
        let advice = found(&heavy, device(limit), 1..=1);
        let [Remedy { changes, .. }] = &advice[..] else { panic!("{advice:?}") };
        assert!(changes.len() > 1 && need_bytes(&heavy, changes) <= limit, "{advice:?}");
        for left_out in 0..changes.len() {
            let mut fewer = changes.clone();
            fewer.remove(left_out);
            assert!(need_bytes(&heavy, &fewer) > limit, "{} is not needed: {advice:?}", changes[left_out].field);
        }
    }

    #[test]
    fn the_fewest_ranks_are_said_with_which_a_change_is_enough() {
        let whole = recipe(Method::Full, Precision::Fp32);
        let advice = found(&whole, Limits { host: Some(40 << 30), ..Limits::default() }, 1..=64);
        let ranks = |method: &str| {
            let of = |remedy: &&Remedy| remedy.changes[0].value == method;
            advice.iter().find(of).map(|remedy| remedy.ranks)
        };
        assert_eq!(ranks("LoRA"), Some(1), "adapters' state is small");
        assert!(ranks("Bf16").is_some_and(|ranks| ranks > 1), "a whole model's state is shared by many: {advice:?}");
    }
}
