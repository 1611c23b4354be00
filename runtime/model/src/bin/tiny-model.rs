//! Writes the tiny random model as a Hugging Face directory, or an adapter of it as PEFT does, for suites that
//! need them in a bucket.

use clap::Parser;
use std::path::PathBuf;

#[derive(Parser)]
struct Options {
    /// Folder to write to; made if it is not there.
    #[arg(long)]
    out: PathBuf,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Write an adapter of the model instead.
    #[arg(long)]
    adapter: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if options.adapter {
        return Ok(vicuna_model::tiny::save_adapter(&options.out, options.seed, 4, &["all-linear"])?);
    }
    let model = vicuna_model::tiny::tiny(options.seed);
    let template = model.chat_template.as_deref();
    vicuna_model::save(&options.out, &model.config, &model.tensors, &model.tokenizer, template)?;
    println!("{}", vicuna_model::weights_digest(&model.tensors)?);
    Ok(())
}
