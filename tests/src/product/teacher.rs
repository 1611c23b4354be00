//! Teacher forcing: a delivered answer is given back to the model as a prompt, which then says how likely each of its tokens
//! was where it stands. Of a greedy answer each must have been the likeliest.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::chat::post;
use super::variants::{ENDS, Reply};

/// How much less likely than another a token may be and still have been chosen: a prompt is computed many tokens at once, an
/// answer one by one, and kernels may add in another order. Such tokens are counted apart, as ties.
const TOLERANCE: f64 = 1e-3;
/// Likelier tokens that are looked at: those that may not come, and one that may.
const ALTERNATIVES: usize = ENDS.len() + 1;

/// How many tokens of greedy answers were the likeliest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Forced {
    pub answers: usize,
    pub likeliest: usize,
    pub ties: usize,
}

impl Forced {
    pub fn add(&mut self, other: Self) {
        self.answers += other.answers;
        self.likeliest += other.likeliest;
        self.ties += other.ties;
    }
}

/// Checks an answer to `words` by /v1/completions whose tokens are named by their ids. An error names the token that greedy
/// decoding would not have chosen.
pub fn force(gateway: SocketAddr, model: &str, words: &str, reply: &Reply) -> Result<Forced> {
    let prompt = ids(&echoed(gateway, &json!({ "model": model, "prompt": words }))?["tokens"])?;
    let choice = reply.choices.get(&0).context("no choice")?;
    let names = choice.tokens.iter().map(|(name, _)| id(name)).collect::<Result<Vec<u64>>>()?;
    let all: Vec<u64> = prompt.iter().chain(&names).copied().collect();
    let scores = echoed(gateway, &json!({ "model": model, "prompt": all }))?;
    let tops = scores["top_logprobs"].as_array().context("no alternatives")?;
    ensure!(tops.len() == all.len(), "{} tokens, scored {}", all.len(), tops.len());
    judge(&names, &tops[prompt.len()..])
}

/// `tops`: for each token the likeliest where it stands, and the token itself.
fn judge(tokens: &[u64], tops: &[Value]) -> Result<Forced> {
    let mut forced = Forced { answers: 1, ..Forced::default() };
    for (position, (token, top)) in tokens.iter().zip(tops).enumerate() {
        let top = top.as_object().context("no alternatives of a token")?;
        let logprobs = top.iter().map(|(name, logprob)| Ok((id(name)?, logprob.as_f64().context("no number")?)));
        let logprobs = logprobs.collect::<Result<Vec<(u64, f64)>>>()?;
        let own = logprobs.iter().find(|(id, _)| id == token).context("the token itself is not scored")?.1;
        let may_come = |id: &u64| *id != *token && !ENDS.iter().any(|end| u64::from(*end) == *id);
        let others = logprobs.iter().filter(|(id, _)| may_come(id)).map(|(_, logprob)| *logprob);
        let behind = others.fold(f64::NEG_INFINITY, f64::max) - own;
        ensure!(behind <= TOLERANCE, "token {token} at {position} is {behind} less likely than another: {top:?}");
        match behind > -TOLERANCE {
            true => forced.ties += 1,
            false => forced.likeliest += 1,
        }
    }
    Ok(forced)
}

/// Log probabilities of a prompt, its tokens named by their ids.
fn echoed(gateway: SocketAddr, ask: &Value) -> Result<Value> {
    let mut body = ask.clone();
    for (name, value) in [
        ("echo", json!(true)),
        ("max_tokens", json!(0)),
        ("logprobs", json!(ALTERNATIVES)),
        ("return_tokens_as_token_ids", json!(true)),
    ] {
        body[name] = value;
    }
    let mut answer = post(gateway, "/v1/completions", &body)?;
    ensure!(answer["error"].is_null(), "{}", answer["error"]);
    Ok(answer["choices"][0]["logprobs"].take())
}

fn ids(names: &Value) -> Result<Vec<u64>> {
    let names = names.as_array().context("no tokens")?;
    names.iter().map(|name| id(name.as_str().context("a token without a name")?)).collect()
}

fn id(name: &str) -> Result<u64> {
    let id = name.strip_prefix("token_id:").and_then(|id| id.parse().ok());
    id.with_context(|| format!("{name:?} is no token's id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_are_told_apart_and_what_may_not_come_does_not_count() {
        let top = |own: f64, other: f64| json!({ "token_id:5": own, "token_id:9": other, "token_id:2": -0.1 });
        let forced = judge(&[5, 5], &[top(-1.0, -2.0), top(-1.0, -1.0)]).unwrap();
        assert_eq!(forced, Forced { answers: 1, likeliest: 1, ties: 1 });
        let error = judge(&[5], &[top(-2.0, -1.0)]).unwrap_err().to_string();
        assert!(error.contains("token 5 at 0 is 1 less likely"), "{error}");
        assert!(judge(&[7], &[top(-1.0, -2.0)]).is_err(), "a token without a score cannot be judged");
    }
}
