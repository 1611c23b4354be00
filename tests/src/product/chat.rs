//! A client of the gateway: curl, reading server-sent events as they come.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Asks one model at one gateway.
#[derive(Debug, Clone)]
pub struct Chat {
    pub gateway: SocketAddr,
    pub model: String,
    pub max_tokens: u32,
    /// Tokens that may not come: without its end a stream goes on to `max_tokens`.
    pub banned: Vec<u32>,
}

/// What a stream gave, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEvent {
    Text(String),
    /// The gateway keeps the connection alive while it has no token to give.
    Comment(String),
    Finished(String),
    Usage(Value),
    Done,
    Failed(String),
}

/// Sends a body and gives the whole answer, be it a refusal.
pub fn post(gateway: SocketAddr, path: &str, body: &Value) -> Result<Value> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--max-time", "60", "--data", &body.to_string()])
        .arg(format!("http://{gateway}{path}"))
        .output()
        .context("cannot start curl")?;
    serde_json::from_slice(&output.stdout).context("the gateway did not answer in JSON")
}

/// What came in one line.
#[derive(Debug, Clone, PartialEq)]
pub enum Chunk {
    Data(Value),
    Comment(String),
    Done,
}

/// An answer while it comes.
#[derive(Debug)]
pub struct Stream {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    /// Of the last chunk, what is not given out yet.
    pending: VecDeque<StreamEvent>,
    /// The event under way, its id and what it says: it counts when the empty line behind it has come.
    event: (Option<String>, Option<Chunk>),
    last_id: Option<String>,
    started: Instant,
}

/// A stream read to its end.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    pub text: String,
    pub finish_reason: Option<String>,
    pub completion_tokens: u64,
    pub resumes: u64,
    pub first_token: Option<Duration>,
    pub longest_gap: Duration,
    pub error: Option<String>,
}

impl Chat {
    pub fn new(gateway: SocketAddr, model: &str) -> Self {
        Self { gateway, model: model.to_owned(), max_tokens: 48, banned: Vec::new() }
    }

    /// Starts a greedy stream; `words` is the user's message.
    pub fn stream(&self, words: &str) -> Result<Stream> {
        self.stream_after(words, None)
    }

    /// Starts a greedy stream, or goes on with one after the event of that id.
    pub fn stream_after(&self, words: &str, last_id: Option<&str>) -> Result<Stream> {
        let bias: serde_json::Map<_, _> = self.banned.iter().map(|id| (id.to_string(), json!(-100))).collect();
        let body = json!({
            "logit_bias": bias,
            "model": self.model,
            "messages": [{"role": "user", "content": words}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        Stream::open(self.gateway, "/v1/chat/completions", &body, last_id)
    }

    /// Streams to the end.
    pub fn ask(&self, words: &str) -> Result<Answer> {
        self.stream(words)?.read_to_end(|_| Ok(()))
    }

    /// The names that the gateway lists.
    pub fn models(gateway: SocketAddr) -> Result<Vec<String>> {
        let output = Command::new("curl")
            .args(["--silent", "--show-error", "--fail", "--max-time", "10"])
            .arg(format!("http://{gateway}/v1/models"))
            .output()?;
        let listed: Value = serde_json::from_slice(&output.stdout).context("the gateway did not answer /v1/models")?;
        let models = listed["data"].as_array().context("/v1/models has no data")?;
        Ok(models.iter().filter_map(|model| Some(model["id"].as_str()?.to_owned())).collect())
    }
}

impl Stream {
    /// Sends a body that asks for a stream, or to go on with one after the event of that id.
    pub fn open(gateway: SocketAddr, path: &str, body: &Value, last_id: Option<&str>) -> Result<Self> {
        let mut child = Command::new("curl")
            .args(["--silent", "--show-error", "--no-buffer", "--max-time", "300"])
            .args(["--header", "content-type: application/json", "--data", &body.to_string()])
            .args(last_id.iter().flat_map(|id| ["--header".to_owned(), format!("last-event-id: {id}")]))
            .arg(format!("http://{gateway}{path}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start curl")?;
        let output = child.stdout.take().context("curl has no output")?;
        Ok(Self {
            child,
            lines: BufReader::new(output).lines(),
            pending: VecDeque::new(),
            event: (None, None),
            last_id: last_id.map(str::to_owned),
            started: Instant::now(),
        })
    }

    /// The next event; nothing when the connection is over.
    pub fn next_event(&mut self) -> Result<Option<StreamEvent>> {
        while self.pending.is_empty() {
            match self.next_chunk()? {
                None => return Ok(None),
                Some(Chunk::Done) => self.pending.push_back(StreamEvent::Done),
                Some(Chunk::Comment(comment)) => self.pending.push_back(StreamEvent::Comment(comment)),
                Some(Chunk::Data(chunk)) => self.pending.extend(chunk_events(&chunk)),
            }
        }
        Ok(self.pending.pop_front())
    }

    /// The next chunk as it is; nothing when the connection is over.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        for line in self.lines.by_ref() {
            let line = line?;
            if line.is_empty() {
                let (id, chunk) = std::mem::take(&mut self.event);
                self.last_id = id.or(self.last_id.take());
                if chunk.is_some() {
                    return Ok(chunk);
                }
            } else if let Some(id) = line.strip_prefix("id: ") {
                self.event.0 = Some(id.to_owned());
            } else if line.starts_with("data: ") {
                self.event.1 = chunk(&line)?;
            } else if let Some(chunk) = chunk(&line)? {
                return Ok(Some(chunk));
            }
        }
        Ok(None)
    }

    /// The id of the last event that [`Stream::next_event`] has given or is about to give.
    pub fn last_id(&self) -> Option<&str> {
        self.last_id.as_deref()
    }

    /// Reads on, telling `watch` of every event; an error of `watch` ends the stream.
    pub fn read_to_end(mut self, mut watch: impl FnMut(&StreamEvent) -> Result<()>) -> Result<Answer> {
        let mut answer = Answer::default();
        let mut last = self.started;
        while let Some(event) = self.next_event()? {
            watch(&event)?;
            if matches!(event, StreamEvent::Text(_)) {
                answer.first_token.get_or_insert(self.started.elapsed());
            }
            if answer.take(event, &mut last) {
                return Ok(answer);
            }
        }
        match &answer.error {
            Some(error) => bail!("the stream failed: {error}"),
            None => bail!("the stream ended without [DONE] after {:?}", answer.text),
        }
    }
}

impl Answer {
    /// Takes an event in; whether it was the last. `last` is when there was text before.
    pub fn take(&mut self, event: StreamEvent, last: &mut Instant) -> bool {
        match event {
            StreamEvent::Text(text) => {
                self.longest_gap = self.longest_gap.max(last.elapsed());
                *last = Instant::now();
                self.text += &text;
            }
            StreamEvent::Finished(reason) => self.finish_reason = Some(reason),
            StreamEvent::Usage(usage) => {
                self.resumes = usage["resumes"].as_u64().unwrap_or(0);
                self.completion_tokens = usage["completion_tokens"].as_u64().unwrap_or(0);
            }
            StreamEvent::Failed(error) => self.error = Some(error),
            StreamEvent::Comment(_) => {}
            StreamEvent::Done => return true,
        }
        false
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a line says, if anything. An error before a stream has begun is a body of its own.
fn chunk(line: &str) -> Result<Option<Chunk>> {
    if let Some(comment) = line.strip_prefix(':') {
        return Ok(Some(Chunk::Comment(comment.trim().to_owned())));
    }
    let Some(data) = line.strip_prefix("data: ").or_else(|| line.starts_with('{').then_some(line)) else {
        return Ok(None);
    };
    if data == "[DONE]" {
        return Ok(Some(Chunk::Done));
    }
    serde_json::from_str(data).map(|data| Some(Chunk::Data(data))).with_context(|| format!("not an event: {data}"))
}

fn chunk_events(chunk: &Value) -> Vec<StreamEvent> {
    let mut events = Vec::new();
    if let Some(message) = chunk["error"]["message"].as_str() {
        events.push(StreamEvent::Failed(message.to_owned()));
    }
    let choice = &chunk["choices"][0];
    if let Some(text) = choice["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
        events.push(StreamEvent::Text(text.to_owned()));
    }
    if let Some(reason) = choice["finish_reason"].as_str() {
        events.push(StreamEvent::Finished(reason.to_owned()));
    }
    if chunk["usage"].is_object() {
        let mut usage = chunk["usage"].clone();
        usage["resumes"] = chunk["vicuna"]["resumes"].clone();
        events.push(StreamEvent::Usage(usage));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_with_the_last_text_and_the_reason_gives_both() {
        let line = r#"data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}"#;
        let Some(Chunk::Data(chunk)) = chunk(line).unwrap() else { panic!("no chunk") };
        assert_eq!(chunk_events(&chunk), [StreamEvent::Text("Hi".into()), StreamEvent::Finished("stop".into())]);
    }

    #[test]
    fn comments_and_ids_carry_no_text() {
        assert_eq!(chunk(": waiting").unwrap(), Some(Chunk::Comment("waiting".into())));
        assert_eq!(chunk("retry: 7").unwrap(), None);
    }
}
