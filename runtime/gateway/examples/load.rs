//! Asks a chat endpoint over HTTP/1.1 and tells how it answers, as one line of JSON. For comparing gateways:
//! blocking sockets, a thread a connection, as little work of its own as possible.
//!
//!     load --url http://127.0.0.1:8080 --model bench/mock [--stream] [--rate 1000] [--connections 64] [--seconds 10]

use anyhow::{Context, Result, bail};
use clap::Parser;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone, Debug, Parser)]
struct Options {
    #[arg(long)]
    url: String,
    #[arg(long)]
    model: String,
    /// Server-sent events instead of one answer.
    #[arg(long)]
    stream: bool,
    /// Requests a second, over all connections; as many as are answered if absent.
    #[arg(long)]
    rate: Option<f64>,
    #[arg(long, default_value_t = 64)]
    connections: u32,
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Before anything counts.
    #[arg(long, default_value_t = 2.0)]
    warm_up: f64,
    /// Open so many streams, say so, and hold them until standard input ends.
    #[arg(long)]
    hold: Option<usize>,
}

/// What one connection has seen.
#[derive(Default)]
struct Seen {
    /// From when a request was due to its last byte.
    seconds: Vec<f64>,
    /// When the last that counts was answered, in seconds after the first was due.
    until: f64,
    /// Answered in all, also what does not count for its time.
    answered: usize,
    chunks: usize,
    errors: usize,
    first_error: Option<String>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let address = options.url.strip_prefix("http://").context("--url begins with http://")?.to_owned();
    let request = request(&address, &options);
    if let Some(count) = options.hold {
        return hold(&address, &request, count);
    }
    let start = Instant::now();
    let threads: Vec<_> = (0..options.connections)
        .map(|number| {
            let (address, request, options) = (address.clone(), request.clone(), options.clone());
            std::thread::spawn(move || ask_on(&address, &request, &options, number, start))
        })
        .collect();
    let mut all = Seen::default();
    for thread in threads {
        let Ok(seen) = thread.join() else { bail!("a connection's thread ended by panic") };
        all.seconds.extend(seen.seconds);
        all.until = all.until.max(seen.until);
        all.answered += seen.answered;
        all.chunks += seen.chunks;
        all.errors += seen.errors;
        all.first_error = all.first_error.or(seen.first_error);
    }
    tell(all, options.seconds);
    Ok(())
}

fn request(address: &str, options: &Options) -> Vec<u8> {
    let body = serde_json::json!({
        "model": options.model, "stream": options.stream, "max_tokens": 16, "temperature": 0,
        "messages": [{ "role": "user", "content": "Tell me about the weather in the mountains, in a few words." }],
    })
    .to_string();
    let length = body.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\n\
         authorization: Bearer sk-bench\r\ncontent-length: {length}\r\n\r\n"
    );
    (head + &body).into_bytes()
}

/// Asks again and again; requests that are due before the warm-up is over do not count.
fn ask_on(address: &str, request: &[u8], options: &Options, number: u32, start: Instant) -> Seen {
    let begin = start + Duration::from_secs_f64(options.warm_up);
    let end = begin + Duration::from_secs_f64(options.seconds);
    let between = options.rate.map(|rate| Duration::from_secs_f64(f64::from(options.connections) / rate));
    let mut due = start + between.unwrap_or_default() * number / options.connections;
    let mut seen = Seen::default();
    let mut connection = None;
    while due < end {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let answered = ask(&mut connection, address, request);
        let done = Instant::now();
        // Without a rate what counts is when it ended.
        let counts = if between.is_some() { due >= begin } else { done >= begin && done < end };
        seen.answered += usize::from(answered.is_ok());
        match answered {
            Ok(chunks) if counts => {
                seen.seconds.push((done - due).as_secs_f64());
                seen.until = (done - begin).as_secs_f64();
                seen.chunks += chunks;
            }
            Ok(_) => {}
            Err(error) => {
                connection = None;
                seen.errors += usize::from(counts);
                seen.first_error.get_or_insert(format!("{error:#}"));
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        due = between.map_or_else(Instant::now, |between| due + between);
    }
    seen
}

/// One request on the connection, which is opened if need be; returns the chunks of its answer.
fn ask(connection: &mut Option<BufReader<TcpStream>>, address: &str, request: &[u8]) -> Result<usize> {
    let reader = match connection {
        Some(reader) => reader,
        None => connection.insert(open(address)?),
    };
    reader.get_mut().write_all(request)?;
    read_answer(reader)
}

fn open(address: &str) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(BufReader::with_capacity(16 << 10, stream))
}

fn read_answer(reader: &mut BufReader<TcpStream>) -> Result<usize> {
    let mut line = String::new();
    read_line(reader, &mut line)?;
    let status = line.clone();
    let (mut length, mut chunked) = (0, false);
    loop {
        read_line(reader, &mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.trim().parse()?,
            "transfer-encoding" => chunked = value.contains("chunked"),
            _ => {}
        }
    }
    let mut body = Vec::new();
    if !chunked {
        body.resize(length, 0);
        reader.read_exact(&mut body)?;
    }
    while chunked {
        read_line(reader, &mut line)?;
        let size = usize::from_str_radix(line.trim_end(), 16).with_context(|| format!("chunk of {line:?} bytes"))?;
        let before = body.len();
        body.resize(before + size + 2, 0);
        reader.read_exact(&mut body[before..])?;
        body.truncate(before + size);
        chunked = size > 0;
    }
    if !status.contains(" 200") {
        bail!("{}: {}", status.trim_end(), String::from_utf8_lossy(&body));
    }
    Ok(body.windows(6).filter(|window| window == b"data: ").count())
}

fn read_line(reader: &mut BufReader<TcpStream>, line: &mut String) -> Result<()> {
    line.clear();
    if reader.read_line(line)? == 0 {
        bail!("the connection ended");
    }
    Ok(())
}

fn tell(mut all: Seen, seconds: f64) {
    all.seconds.sort_by(f64::total_cmp);
    let count = all.seconds.len();
    let at = |share: f64| all.seconds.get(((count as f64 * share) as usize).min(count.saturating_sub(1))).copied();
    let ms = |share| at(share).map(|seconds| (seconds * 1e6).round() / 1e3);
    println!(
        "{}",
        serde_json::json!({
            "requests": count, "per_second": (count as f64 / seconds.max(all.until)).round(), "errors": all.errors,
            "p50_ms": ms(0.5), "p99_ms": ms(0.99), "chunks": all.chunks as f64 / count.max(1) as f64,
            "answered": all.answered, "first_error": all.first_error,
        })
    );
}

/// Opens streams and reads the beginning of each, so that all are running.
fn hold(address: &str, request: &[u8], count: usize) -> Result<()> {
    let mut streams = Vec::with_capacity(count);
    let started = Instant::now();
    for number in 0..count {
        let mut stream = TcpStream::connect(address).with_context(|| format!("stream {number}"))?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.write_all(request)?;
        streams.push(stream);
    }
    let mut bytes = [0; 4096];
    for (number, stream) in streams.iter_mut().enumerate() {
        let read = stream.read(&mut bytes).with_context(|| format!("stream {number}"))?;
        if !bytes[..read].starts_with(b"HTTP/1.1 200") {
            bail!("stream {number}: {}", String::from_utf8_lossy(&bytes[..read]));
        }
    }
    println!("{}", serde_json::json!({ "streams": count, "seconds": started.elapsed().as_secs_f64() }));
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    Ok(())
}
