//! The model card of a result: what it was made from, how, and what came of it.

use crate::log::Line;
use crate::prepare::{DATA_REPORT, Session};

/// The drawing beside the card.
pub const PLOT: &str = "loss.svg";

/// Markdown with the front matter of a Hugging Face card. `digest` is that of the weights.
pub fn markdown(session: &Session, log: &[Line], digest: &str) -> String {
    let job = &session.job;
    let recipe = serde_json::to_string_pretty(&job.recipe).unwrap_or_default();
    let data: Vec<String> = job.dataset.iter().map(|set| format!("- `{}`, weight {}", set.from, set.weight)).collect();
    let base = &job.model.from;
    let adapted = session.adapted.is_some();
    format!(
        "---\nlicense: unknown\nbase_model: {}\n{}tags: [conversational]\n---\n\n\
         # {}\n\n\
         {} `{base}`, trained in {} steps. The licence is for you to fill in: it follows from those of the base model \
         and of the data, which are not known here.\n\n\
         | | |\n|---|---|\n{}\n\
         ![loss]({PLOT})\n\n\
         ## Data\n\n{}\n\n{}. In full: `{}`.\n\n\
         ## Recipe\n\n```json\n{recipe}\n```\n",
        // A JSON string is a YAML string, whatever is in it.
        serde_json::Value::from(base.as_str()),
        if adapted { "base_model_relation: adapter\nlibrary_name: peft\n" } else { "" },
        job.name,
        if adapted { "LoRA adapters for" } else { "Fine-tuned from" },
        session.data.steps(),
        rows(session, log, digest),
        data.join("\n"),
        session.data_report.summary(),
        session.store.uri_of(DATA_REPORT),
    )
}

fn rows(session: &Session, log: &[Line], digest: &str) -> String {
    let mut rows = vec![
        ("loss of the last step", last(log, Line::loss)),
        ("loss on the held-out conversations", last(log, Line::held_out_loss)),
        ("pods that left on the way", log.iter().map(|line| line.left().len()).sum::<usize>().to_string()),
        ("digest of the weights (BLAKE3)", format!("`{digest}`")),
        ("digest of the recipe (BLAKE3)", format!("`{}`", session.recipe_digest)),
    ];
    rows.retain(|(_, value)| !value.is_empty());
    rows.into_iter().map(|(name, value)| format!("| {name} | {value} |\n")).collect()
}

/// The newest of these numbers; empty if there is none.
fn last(log: &[Line], value: impl Fn(&Line) -> Option<f64>) -> String {
    log.iter().rev().find_map(value).map_or_else(String::new, |loss| format!("{loss:.4}"))
}
