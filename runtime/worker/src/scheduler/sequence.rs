//! A sequence in the batch: its tokens, its blocks, and how far they are computed.

use super::{Counts, Job, Task};
use crate::blocks::{BlockPool, Chain, chain, start};
use std::time::Instant;
use vicuna_model::inference::{BLOCK_TOKENS, Outputs, Piece, Want};
use vicuna_protocol::batches::Gathered;
use vicuna_protocol::inference::failure::Code;
use vicuna_protocol::inference::worker_message::Body;

/// Blocks that are worth a step's delay.
const WORTH_WAITING: usize = 4;

#[derive(Debug)]
pub struct Running {
    pub job: Box<Job>,
    pub ended: bool,
    /// Prompt and completion; of an embedding, the text at hand.
    ids: Vec<u32>,
    /// Tokens whose keys and values are in the blocks.
    computed: usize,
    blocks: Vec<u32>,
    /// The name of the blocks that are full and named.
    chain: Chain,
    named: usize,
    /// To be told at the step's end.
    news: Vec<Body>,
    /// What is told later, where the client wants the answer in one piece.
    gathered: Gathered,
}

impl Running {
    pub fn new(job: Box<Job>) -> Self {
        let ids = match &job.task {
            Task::Complete { prompt, completion, .. } => [prompt, completion.tokens()].concat(),
            Task::Embed(embedder) => embedder.next().unwrap_or_default().to_vec(),
        };
        let chain = start(job.adapter);
        Self {
            job,
            ended: false,
            ids,
            computed: 0,
            blocks: Vec::new(),
            chain,
            named: 0,
            news: Vec::new(),
            gathered: Gathered::default(),
        }
    }

    /// Tokens that are there and not computed.
    pub fn pending(&self) -> usize {
        if self.ended { 0 } else { self.ids.len() - self.computed }
    }

    /// Its prompt is computed, and a token is to follow the last one.
    pub fn is_answered(&self) -> bool {
        self.computed > 0 && self.pending() == 1
    }

    /// Says how far it is with what it begins with; what is being answered speaks for itself.
    pub fn tell_progress(&self) {
        if !self.ended && !self.is_answered() {
            self.job.tell_progress(self.computed, self.ids.len());
        }
    }

    /// Blocks that it still needs for its tokens and the next one.
    pub fn missing_blocks(&self) -> usize {
        (self.ids.len() + 1).div_ceil(BLOCK_TOKENS).saturating_sub(self.blocks.len())
    }

    /// Takes over blocks that others have computed of the same beginning, as long as its own end with
    /// a whole one. The last token is always computed, since what follows it is asked for. Returns how
    /// many tokens it gained.
    pub fn reuse(&mut self, pool: &mut BlockPool) -> usize {
        let before = self.computed;
        let whole = self.blocks.len() * BLOCK_TOKENS == self.computed;
        while whole && self.shares_blocks() && self.computed + BLOCK_TOKENS < self.ids.len() {
            let name = chain(&self.chain, &self.ids[self.computed..self.computed + BLOCK_TOKENS]);
            let Some(block) = pool.reuse(&name) else { break };
            self.blocks.push(block);
            self.computed += BLOCK_TOKENS;
            (self.chain, self.named) = (name, self.named + 1);
        }
        self.computed - before
    }

    /// Whether `other`, which computes its next `tokens` in this step, then has much that this one need
    /// not compute itself: the choices of one request, or a long system prompt.
    pub fn gains_by_waiting(&self, other: &Self, tokens: usize) -> bool {
        if !self.shares_blocks() || !other.shares_blocks() || self.job.adapter != other.job.adapter {
            return false;
        }
        let theirs = &other.ids[..other.computed + tokens];
        let common = self.ids.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
        common / BLOCK_TOKENS >= self.computed / BLOCK_TOKENS + WORTH_WAITING
    }

    /// Scores and embeddings need every token to be computed.
    fn shares_blocks(&self) -> bool {
        matches!(&self.job.task, Task::Complete { completion, .. } if !completion.scores_prompt())
    }

    /// Blocks for the next `tokens`; `false` if there are too few. Those taken stay.
    pub fn take_blocks(&mut self, tokens: usize, pool: &mut BlockPool) -> bool {
        while self.blocks.len() * BLOCK_TOKENS < self.computed + tokens {
            match pool.take() {
                Some(block) => self.blocks.push(block),
                None => return false,
            }
        }
        true
    }

    pub fn release(&mut self, pool: &mut BlockPool) {
        pool.release_all(&mut self.blocks);
    }

    /// The next `tokens` for the engine.
    pub fn piece(&self, tokens: usize) -> Piece<'_> {
        let end = self.computed + tokens;
        let want = match &self.job.task {
            Task::Embed(_) => Want::Hidden,
            Task::Complete { completion, .. } if completion.scores_prompt() => Want::Every,
            Task::Complete { .. } if end == self.ids.len() => Want::Last,
            Task::Complete { .. } => Want::Nothing,
        };
        Piece {
            tokens: &self.ids[self.computed..end],
            past: self.computed,
            blocks: &self.blocks,
            want,
            adapter: self.job.adapter,
        }
    }

    /// Takes what the engine has made of piece `index`.
    pub fn advance(
        &mut self,
        tokens: usize,
        index: usize,
        outputs: &mut Outputs,
        pool: &mut BlockPool,
        counts: &Counts<'_>,
    ) {
        let first = self.computed;
        self.computed += tokens;
        self.name_full_blocks(pool);
        if first < self.prompt_length() {
            counts.all.prompt_tokens.inc_by(tokens as u64);
        }
        match &mut self.job.task {
            Task::Complete { completion, .. } => {
                completion.reused(first);
                self.score_and_continue(first, index, outputs, counts);
            }
            Task::Embed(embedder) => {
                embedder.add(outputs.hidden(index));
                if self.computed == self.ids.len() {
                    embedder.finish_input();
                    self.next_input(pool);
                }
            }
        }
    }

    fn prompt_length(&self) -> usize {
        match &self.job.task {
            Task::Complete { prompt, .. } => prompt.len(),
            Task::Embed(_) => self.ids.len(),
        }
    }

    fn name_full_blocks(&mut self, pool: &mut BlockPool) {
        if !self.shares_blocks() {
            return;
        }
        while (self.named + 1) * BLOCK_TOKENS <= self.computed {
            let tokens = &self.ids[self.named * BLOCK_TOKENS..(self.named + 1) * BLOCK_TOKENS];
            self.chain = chain(&self.chain, tokens);
            pool.publish(self.blocks[self.named], self.chain);
            self.named += 1;
        }
    }

    /// Scores the prompt if that is wanted, and chooses the next token once all are computed.
    fn score_and_continue(&mut self, first: usize, index: usize, outputs: &mut Outputs, counts: &Counts<'_>) {
        let Task::Complete { prompt, completion, .. } = &mut self.job.task else { return };
        let scored = completion.scores_prompt();
        let mut rows = outputs.logits(index);
        if scored {
            for (row, logits) in (first..self.computed).zip(rows.by_ref()) {
                match prompt.get(row + 1) {
                    Some(next) => completion.score_prompt(logits, *next),
                    None if row + 1 == self.ids.len() => {
                        self.news.extend(completion.take_prompt_scores());
                        return self.choose(logits, counts);
                    }
                    None => {}
                }
            }
        } else if let Some(logits) = rows.next() {
            self.choose(logits, counts);
        }
    }

    /// Chooses the token that follows from `logits [V]`, tells the gateway, and goes on unless that
    /// was the end.
    fn choose(&mut self, logits: &mut [f32], counts: &Counts<'_>) {
        let Task::Complete { prompt, completion, generate } = &mut self.job.task else { return };
        let chosen = completion.choose(logits);
        let told = chosen.and_then(|chosen| Ok((chosen.token, completion.accept(chosen)?)));
        let (token, delta) = match told {
            Ok(told) => told,
            Err(reason) => return self.fail(Code::Internal, reason),
        };
        counts.all.tokens.inc();
        counts.model.generation_tokens.inc();
        let now = Instant::now();
        if !self.job.times.has_begun() {
            counts.model.prompt_tokens.inc_by(prompt.len() as u64);
            counts.model.looked_up(prompt.len(), completion.cached_tokens());
            // One that came with tokens had its first elsewhere.
            if completion.tokens().len() <= 1 {
                counts.model.first_token_seconds.observe(self.job.times.since_arrival(now).as_secs_f64());
            }
        }
        if let Some(gap) = self.job.times.token(now) {
            counts.model.inter_token_seconds.observe(gap.as_secs_f64());
        }
        let done = completion.done();
        self.ended = done.is_some();
        self.ids.push(token);
        let delta = match generate.whole {
            true => delta.and_then(|delta| self.gathered.add(delta, now)),
            false => delta,
        };
        self.news.extend(delta.map(Body::Delta));
        if let Some(done) = done {
            self.news.extend(self.gathered.take().map(Body::Delta));
            self.news.push(done);
        }
    }

    /// Goes on with the request's next text.
    fn next_input(&mut self, pool: &mut BlockPool) {
        let Task::Embed(embedder) = &mut self.job.task else { return };
        if let Some(done) = embedder.done() {
            self.news.push(done);
            self.ended = true;
            return;
        }
        self.ids = embedder.next().unwrap_or_default().to_vec();
        self.computed = 0;
        pool.release_all(&mut self.blocks);
    }

    /// Tells the gateway what there is to tell.
    pub fn tell(&mut self) {
        self.news.drain(..).for_each(|body| self.job.replies.send(body));
    }

    /// What is being gathered, too: what follows it comes from elsewhere.
    pub fn tell_all(&mut self) {
        self.news.extend(self.gathered.take().map(Body::Delta));
        self.tell();
    }

    /// Ends it here.
    pub fn fail(&mut self, code: Code, reason: String) {
        self.ended = true;
        self.tell_all();
        self.job.fail(code, reason);
    }
}
