//! Makes what a gateway and a worker need to trust each other, says where it is, and removes it when standard
//! input ends: for `mock-worker`, without an operator.

#[path = "../tests/support/trust.rs"]
mod trust;

use anyhow::Result;

/// Workers that there are tokens for.
const WORKERS: usize = 4;

fn main() -> Result<()> {
    let trust = trust::Trust::new();
    let tokens: Vec<_> = (0..WORKERS)
        .map(|number| {
            let pod = format!("mock-{number}");
            trust.token("vicuna-gateway", "bench", &pod);
            trust.path(&format!("vicuna-gateway.bench.{pod}.token"))
        })
        .collect();
    println!(
        "{}",
        serde_json::json!({
            "folder": trust.path(""), "ca": trust.path("ca.crt"), "certificate": trust.path("tls.crt"),
            "key": trust.path("tls.key"), "tokens": tokens,
        })
    );
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}
