//! Writes the CustomResourceDefinitions to `crds/yaml` and to the chart that installs them.

use std::error::Error;
use std::fs;
use std::path::Path;
use vicuna_crds::definition;

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in definition::files()? {
        write(&root.join("yaml").join(&name), &text)?;
        let chart = root.join("../charts/vicuna-operator-crds/templates");
        write(&chart.join(&name), &definition::as_chart_template(&text))?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    println!("{}", path.display());
    Ok(())
}
