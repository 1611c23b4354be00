//! Writes the tiny random model as a Hugging Face directory, for suites that need a model in a bucket.

use clap::Parser;
use std::path::PathBuf;

#[derive(Parser)]
struct Options {
    /// Folder to write to; made if it is not there.
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let model = vicuna_model::tiny::tiny(options.seed);
    let template = model.chat_template.as_deref();
    vicuna_model::save(&options.out, &model.config, &model.tensors, &model.tokenizer, template)?;
    println!("{}", vicuna_model::weights_digest(&model.tensors)?);
    Ok(())
}
