//! Stop strings: text that may be the beginning of one is held back until it is known.

use std::ops::ControlFlow;

/// Watches the text of one completion.
#[derive(Debug)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty stop strings stop nothing.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new() }
    }

    /// Adds text; returns what may be shown. `Break` holds what comes before the first stop string.
    pub fn push(&mut self, text: &str) -> ControlFlow<String, String> {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop)).min() {
            self.held.truncate(at);
            return ControlFlow::Break(std::mem::take(&mut self.held));
        }
        let rest = self.held.split_off(self.safe_length());
        ControlFlow::Continue(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back for a stop string that did not come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length before the longest end of the held text that begins a stop string.
    fn safe_length(&self) -> usize {
        let may_stop = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        self.held.char_indices().map(|(at, _)| at).find(may_stop).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stops(stops: &[&str]) -> StopStrings {
        StopStrings::new(&stops.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn a_stop_string_across_pieces_ends_the_text_before_it() {
        let mut watched = stops(&["###", "END"]);
        assert_eq!(watched.push("one #"), ControlFlow::Continue("one ".into()));
        assert_eq!(watched.push("# two E"), ControlFlow::Continue("## two ".into()));
        assert_eq!(watched.push("ND three"), ControlFlow::Break(String::new()));
    }

    #[test]
    fn the_earliest_of_several_wins() {
        assert_eq!(stops(&["b", "ab"]).push("xab"), ControlFlow::Break("x".into()));
    }

    #[test]
    fn text_held_for_nothing_comes_at_the_end() {
        let mut watched = stops(&["###"]);
        assert_eq!(watched.push("a##"), ControlFlow::Continue("a".into()));
        assert_eq!(watched.finish(), "##");
    }

    #[test]
    fn without_stop_strings_nothing_is_held() {
        let mut watched = stops(&[""]);
        assert_eq!(watched.push("é#"), ControlFlow::Continue("é#".into()));
    }
}
