//! Vectors of texts: the mean of the last hidden states, of length 1.

use vicuna_protocol::inference::worker_message::Body;
use vicuna_protocol::inference::{Embedding, Embeddings};

/// Texts that one request may hold.
pub const MAX_INPUTS: usize = 2048;

/// One request's texts, embedded one after another.
#[derive(Debug)]
pub struct Embedder {
    request: String,
    inputs: Vec<Vec<u32>>,
    vectors: Vec<Embedding>,
    sum: Vec<f32>,
}

impl Embedder {
    /// The error is for the client.
    pub fn new(request: String, inputs: Vec<Vec<u32>>, vocabulary: usize, max_length: usize) -> Result<Self, String> {
        if inputs.is_empty() || inputs.len() > MAX_INPUTS {
            return Err(format!("input has {} texts; from 1 to {MAX_INPUTS} are allowed", inputs.len()));
        }
        for (index, ids) in inputs.iter().enumerate() {
            if ids.is_empty() || ids.len() > max_length {
                return Err(format!("input {index} has {} tokens; this model takes from 1 to {max_length}", ids.len()));
            }
            if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
                return Err(format!("token {id} of input {index} is not in the model's vocabulary of {vocabulary}"));
            }
        }
        Ok(Self { request, inputs, vectors: Vec::new(), sum: Vec::new() })
    }

    pub fn request(&self) -> &str {
        &self.request
    }

    /// The text to embed next; `None` when all are.
    pub fn next(&self) -> Option<&[u32]> {
        self.inputs.get(self.vectors.len()).map(Vec::as_slice)
    }

    /// Adds the hidden states of some of its tokens.
    pub fn add(&mut self, hidden: &[f32]) {
        self.sum.resize(hidden.len(), 0.0);
        self.sum.iter_mut().zip(hidden).for_each(|(sum, value)| *sum += value);
    }

    /// Forgets a text that was begun.
    pub fn restart(&mut self) {
        self.sum.clear();
    }

    /// All tokens of the text have been added.
    pub fn finish_input(&mut self) {
        let sum = std::mem::take(&mut self.sum);
        // The length of the mean cancels.
        let length = sum.iter().map(|value| value * value).sum::<f32>().sqrt();
        let scale = if length > 0.0 { length.recip() } else { 0.0 };
        self.vectors.push(Embedding { values: sum.iter().map(|value| value * scale).collect() });
    }

    /// The answer, once all texts are embedded.
    pub fn done(&mut self) -> Option<Body> {
        if self.next().is_some() {
            return None;
        }
        Some(Body::Embeddings(Embeddings {
            request: self.request.clone(),
            vectors: std::mem::take(&mut self.vectors),
            prompt_tokens: self.inputs.iter().map(|ids| ids.len() as u32).sum(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_and_come_in_order() {
        let mut embedder = Embedder::new("r".into(), vec![vec![1, 2], vec![3]], 10, 5).unwrap();
        assert_eq!(embedder.next(), Some(&[1, 2][..]));
        embedder.add(&[9.0, 9.0]);
        embedder.restart();
        embedder.add(&[1.0, 0.0]);
        embedder.add(&[2.0, 4.0]);
        embedder.finish_input();
        assert!(embedder.done().is_none());
        assert_eq!(embedder.next(), Some(&[3][..]));
        embedder.add(&[0.0, -2.0]);
        embedder.finish_input();
        let Some(Body::Embeddings(found)) = embedder.done() else { panic!("not done") };
        assert_eq!(found.prompt_tokens, 3);
        assert_eq!(found.vectors[0].values, [0.6, 0.8]);
        assert_eq!(found.vectors[1].values, [0.0, -1.0]);
    }

    #[test]
    fn inputs_that_cannot_be_embedded_are_refused_by_number() {
        let refused = |inputs| Embedder::new("r".into(), inputs, 10, 5).unwrap_err();
        assert!(refused(vec![]).contains("0 texts"));
        assert!(refused(vec![vec![1], vec![]]).contains("input 1 has 0 tokens"));
        assert!(refused(vec![vec![1; 6]]).contains("6 tokens"));
        assert!(refused(vec![vec![10]]).contains("vocabulary"));
    }
}
