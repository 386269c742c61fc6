//! Stop strings across token borders. [`StopMatcher`] runs the Aho-Corasick automaton (CACM 18(6), 1975) of all stop
//! strings over the text: its state is the longest end of the text that begins a stop string, which is exactly what must
//! be held back. So text is given out as early as it can be, and nothing of a stop string that later completes has been.

use openlora_types::InvalidField;

use super::TextError;

/// A stop string was completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopMatch {
    /// Which, as an index into the list the matcher was made with.
    pub stop: usize,
}

/// Finds the first stop string to be completed; of several completed by the same character, the longest.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    /// The automaton; 0 is the root.
    nodes: Vec<Node>,
    state: usize,
    /// Text that may yet be the beginning of a stop string: as long as the state is deep.
    held: String,
    include_stop: bool,
    matched: Option<StopMatch>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    /// Bytes from the root.
    depth: usize,
    next: Vec<(u8, usize)>,
    /// The node of the longest proper suffix.
    fail: usize,
    /// The longest stop string that ends here, and its length.
    stop: Option<(usize, usize)>,
}

impl StopMatcher {
    /// With `include_stop`, a match gives the stop string out as well.
    ///
    /// # Errors
    /// An empty stop string, which would match everywhere.
    pub fn new(stops: &[String], include_stop: bool) -> Result<Self, TextError> {
        let mut nodes = vec![Node::default()];
        for (index, stop) in stops.iter().enumerate() {
            if stop.is_empty() {
                return Err(InvalidField::new(format!("stop[{index}]"), "must not be empty").into());
            }
            let end = stop.bytes().fold(0, |node, byte| descend(&mut nodes, node, byte));
            // Of equal stop strings the first is reported.
            nodes[end].stop.get_or_insert((index, stop.len()));
        }
        link(&mut nodes);
        Ok(Self { nodes, state: 0, held: String::new(), include_stop, matched: None })
    }

    /// Adds `text` and appends to `out` what no stop string can claim any more. After a match nothing more is given out
    /// and every further call reports the same match.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<StopMatch> {
        if self.matched.is_some() {
            return self.matched;
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (offset, byte) in text.bytes().enumerate() {
            self.state = step(&self.nodes, self.state, byte);
            if let Some((stop, bytes)) = self.nodes[self.state].stop {
                let end = before + offset + 1;
                out.push_str(&self.held[..if self.include_stop { end } else { end - bytes }]);
                self.held.clear();
                self.matched = Some(StopMatch { stop });
                return self.matched;
            }
        }
        let free = self.held.len() - self.nodes[self.state].depth;
        out.push_str(&self.held[..free]);
        self.held.drain(..free);
        None
    }

    /// The text is over: what was held back is part of it after all.
    pub fn finish(&mut self) -> String {
        self.state = 0;
        std::mem::take(&mut self.held)
    }
}

/// The child of `node` by `byte`, made where it is missing.
fn descend(nodes: &mut Vec<Node>, node: usize, byte: u8) -> usize {
    if let Some(child) = child(&nodes[node], byte) {
        return child;
    }
    let made = nodes.len();
    nodes[node].next.push((byte, made));
    nodes.push(Node { depth: nodes[node].depth + 1, ..Node::default() });
    made
}

fn child(node: &Node, byte: u8) -> Option<usize> {
    node.next.iter().find(|(label, _)| *label == byte).map(|(_, child)| *child)
}

/// Sets the suffix links, breadth first, and the stop strings that end at a node by being a suffix of it.
fn link(nodes: &mut [Node]) {
    let mut queue = std::collections::VecDeque::from([0]);
    while let Some(parent) = queue.pop_front() {
        for (byte, node) in nodes[parent].next.clone() {
            nodes[node].fail = if parent == 0 { 0 } else { step(nodes, nodes[parent].fail, byte) };
            let inherited = nodes[nodes[node].fail].stop;
            nodes[node].stop = nodes[node].stop.or(inherited);
            queue.push_back(node);
        }
    }
}

/// One byte on. Amortised constant: each step down the suffix links was paid for by a step up.
fn step(nodes: &[Node], mut state: usize, byte: u8) -> usize {
    loop {
        if let Some(next) = child(&nodes[state], byte) {
            return next;
        }
        if state == 0 {
            return 0;
        }
        state = nodes[state].fail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every end of every prefix, longest stop string first.
    fn naive(stops: &[String], text: &str, include_stop: bool) -> (String, Option<usize>) {
        for end in 1..=text.len() {
            let ends_here = |stop: &&String| text.as_bytes()[..end].ends_with(stop.as_bytes());
            if let Some(stop) = stops.iter().filter(ends_here).max_by_key(|stop| stop.len()) {
                let index = stops.iter().position(|other| other == stop);
                let cut = if include_stop { end } else { end - stop.len() };
                return (text[..cut].to_owned(), index);
            }
        }
        (text.to_owned(), None)
    }

    fn run(stops: &[String], chunks: &[String], include_stop: bool) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops, include_stop).expect("no empty stop string");
        let (mut out, mut seen) = (String::new(), String::new());
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        for chunk in chunks {
            if let Some(found) = matcher.push(chunk, &mut out) {
                let given = out.clone();
                assert_eq!(matcher.push("more", &mut out), Some(found), "a match is final");
                assert_eq!(out, given, "nothing follows a match");
                return (out + &matcher.finish(), Some(found.stop));
            }
            seen.push_str(chunk);
            assert!(seen.starts_with(&out));
            let held = &seen[out.len()..];
            assert!(held.len() < longest.max(1), "held back {held:?}");
            assert!(
                held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)),
                "held back {held:?} for nothing"
            );
        }
        (out + &matcher.finish(), None)
    }

    #[test]
    fn text_before_the_first_completed_stop_string_is_given_out_and_nothing_after_it() {
        let strings = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        for (stops, chunks, text, stop) in [
            (&["\n\n"][..], &["one\n", "\ntwo"][..], "one", Some(0)),
            (&["END"], &["a E", "N", "d EN", "D!"], "a ENd ", Some(0)),
            (&["abc", "b"], &["ab"], "a", Some(1)),
            (&["b", "ab"], &["xab"], "x", Some(1)),
            (&["aab"], &["aaab"], "a", Some(0)),
            (&["é", "日本"], &["caf", "日", "本語"], "caf", Some(1)),
            (&["x", "x"], &["x"], "", Some(0)),
            (&["stop"], &["sto"], "sto", None),
            (&[], &["a", "b"], "ab", None),
        ] {
            let (stops, chunks) = (strings(stops), strings(chunks));
            assert_eq!(run(&stops, &chunks, false), (text.to_owned(), stop), "{stops:?} {chunks:?}");
        }
        assert_eq!(run(&strings(&["END"]), &strings(&["aE", "NDb"]), true), ("aEND".to_owned(), Some(0)));
        let error = StopMatcher::new(&strings(&["a", ""]), false).expect_err("an empty stop string");
        assert_eq!(error.to_string(), "stop[1] must not be empty");
    }

    #[test]
    fn any_cut_of_any_text_gives_what_a_search_of_the_whole_text_gives() {
        // A small alphabet, so that stop strings overlap and half-match often.
        let word =
            |codes: &[u8]| codes.iter().map(|code| ['a', 'b', 'é', '日'][*code as usize % 4]).collect::<String>();
        bolero::check!().with_type::<(Vec<Vec<u8>>, Vec<Vec<u8>>, bool)>().for_each(|(stops, chunks, include_stop)| {
            let stops: Vec<String> = stops.iter().take(4).map(|stop| word(&stop[..stop.len().min(5)])).collect();
            let stops: Vec<String> = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
            let chunks: Vec<String> = chunks.iter().map(|chunk| word(chunk)).collect();
            assert_eq!(run(&stops, &chunks, *include_stop), naive(&stops, &chunks.concat(), *include_stop));
        });
    }
}
