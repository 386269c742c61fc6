//! Python's `re` for module names, in the subset that means the same here.
//!
//! PEFT hands the strings of `target_modules`, `exclude_modules`, `layers_pattern`, `rank_pattern` and `alpha_pattern`
//! to Python's `re`. Two engines agree on most of what people write and differ in corners, so a pattern is first
//! translated token by token; whatever is outside the common ground (back-references, inline flags, possessive
//! quantifiers, set operations) is refused by name instead of being guessed at. Module names are ASCII without
//! newlines, so `\d`, `\w` and `$` need only be right there.
//!
//! Patterns without look-around run in linear time; those with it run under a step limit.

use fancy_regex::{Regex, RegexBuilder};
use openlora_types::Limits;

/// Steps one match may take before the pattern is refused. Names are short; honest patterns need hundreds.
const STEPS_MAX: usize = 10_000;
/// Bytes a compiled pattern may take.
const COMPILED_BYTES_MAX: usize = 1 << 20;
/// The largest count in `{m,n}`.
const REPEAT_MAX: u32 = 255;
/// Groups within groups.
const GROUPS_DEEP_MAX: usize = 32;

/// A checked and translated pattern, not compiled yet: a configuration may hold thousands, used one after the other.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pattern {
    /// As written, for messages.
    source: String,
    /// The same in the syntax of `fancy_regex`, without anchors.
    translated: String,
    looks_around: bool,
}

impl Pattern {
    /// Checks `source` and translates it.
    ///
    /// # Errors
    /// What cannot be accepted, as the reason of an `InvalidField`.
    pub(crate) fn parse(source: &str, limits: &Limits) -> Result<Self, String> {
        if source.len() > limits.regex_bytes_max {
            let max = limits.regex_bytes_max;
            return Err(format!("has a pattern of {} bytes; the limit regex_bytes_max is {max}", source.len()));
        }
        let mut translator =
            Translator { rest: source, out: String::with_capacity(source.len()), ..Default::default() };
        translator.run().map_err(|why| format!("has the pattern `{}`, which {why}", super::json::shown(source)))?;
        Ok(Self { source: source.to_owned(), translated: translator.out, looks_around: translator.looks_around })
    }

    /// Whether the pattern needs the engine that can be slow.
    pub(crate) fn looks_around(&self) -> bool {
        self.looks_around
    }

    /// `re.fullmatch(pattern, name)`.
    pub(crate) fn full(&self) -> Result<Matcher<'_>, String> {
        self.compile(&format!(r"\A(?:{})\z", self.translated))
    }

    /// `re.match(rf"(.*\.)?({pattern})$", name)`, PEFT's `get_pattern_key`.
    pub(crate) fn suffix(&self) -> Result<Matcher<'_>, String> {
        self.compile(&format!(r"\A(?:.*\.)?(?:{})\z", self.translated))
    }

    /// `re.match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", name)`: the pattern stands bare, as PEFT has it.
    pub(crate) fn layer(&self) -> Result<Matcher<'_>, String> {
        self.compile(&format!(r"\A(?:(?:^|.*?\.){}\.(?P<idx>[0-9]+)\.)", self.translated))
    }

    fn compile(&self, text: &str) -> Result<Matcher<'_>, String> {
        let built = RegexBuilder::new(text).backtrack_limit(STEPS_MAX).delegate_size_limit(COMPILED_BYTES_MAX).build();
        let regex =
            built.map_err(|error| format!("has the pattern `{}`, which does not compile: {error}", self.source))?;
        Ok(Matcher { regex, source: &self.source })
    }
}

/// A compiled pattern.
pub(crate) struct Matcher<'a> {
    regex: Regex,
    source: &'a str,
}

impl Matcher<'_> {
    /// Whether `name` matches.
    pub(crate) fn matches(&self, name: &str) -> Result<bool, String> {
        self.regex.is_match(name).map_err(|_| self.too_slow())
    }

    /// `None` when `name` does not match; otherwise the number in the group `idx`, if the match went through it.
    pub(crate) fn index(&self, name: &str) -> Result<Option<Option<u64>>, String> {
        let captures = self.regex.captures(name).map_err(|_| self.too_slow())?;
        Ok(captures.map(|captures| captures.name("idx").and_then(|idx| idx.as_str().parse().ok())))
    }

    fn too_slow(&self) -> String {
        format!("has the pattern `{}`, which takes more than {STEPS_MAX} steps; simplify it", self.source)
    }
}

/// What stands before a quantifier decides whether it may stand there.
#[derive(Clone, Copy, Default, PartialEq)]
enum Before {
    /// Nothing to repeat: the start, an anchor, `(`, `|`.
    #[default]
    Nothing,
    /// One character or class: may be repeated, with counts too.
    Atom,
    /// A group: may be repeated, but counts would multiply, so only `*`, `+` and `?`.
    Group,
    /// A quantifier: only the `?` that makes it lazy.
    Quantifier,
}

#[derive(Default)]
struct Translator<'a> {
    rest: &'a str,
    out: String,
    /// For every open group, whether it is a look-around (which cannot be repeated).
    open: Vec<bool>,
    before: Before,
    looks_around: bool,
}

impl Translator<'_> {
    fn run(&mut self) -> Result<(), String> {
        while let Some(c) = self.next() {
            match c {
                '(' => self.open_group()?,
                ')' => {
                    let around = self.open.pop().ok_or("has a `)` too many")?;
                    self.emit(")", if around { Before::Nothing } else { Before::Group });
                }
                '|' => self.emit("|", Before::Nothing),
                '^' => self.emit(r"\A", Before::Nothing),
                '$' => self.emit(r"\z", Before::Nothing),
                '.' => self.emit(".", Before::Atom),
                '*' | '+' | '?' => self.quantifier(c)?,
                '{' => self.count()?,
                '[' => self.class()?,
                '\\' => self.escape()?,
                c => self.literal(c),
            }
        }
        if self.open.is_empty() { Ok(()) } else { Err("has a `(` that is not closed".into()) }
    }

    fn next(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    fn eat(&mut self, prefix: &str) -> bool {
        match self.rest.strip_prefix(prefix) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn emit(&mut self, text: &str, before: Before) {
        self.out.push_str(text);
        self.before = before;
    }

    fn literal(&mut self, c: char) {
        self.out.push_str(&fancy_regex::escape(c.encode_utf8(&mut [0; 4])));
        self.before = Before::Atom;
    }

    fn open_group(&mut self) -> Result<(), String> {
        if self.open.len() == GROUPS_DEEP_MAX {
            return Err(format!("nests more than {GROUPS_DEEP_MAX} groups"));
        }
        // No pattern can refer back to a group, so capturing ones need not capture.
        let (text, around) = if !self.eat("?") || self.eat(":") {
            ("(?:", false)
        } else if self.eat("P<") {
            let end = self.rest.find('>').ok_or("has a group name that is not closed")?;
            self.rest = &self.rest[end + 1..];
            ("(?:", false)
        } else if self.eat("=") {
            ("(?=", true)
        } else if self.eat("!") {
            ("(?!", true)
        } else if self.eat("<=") {
            ("(?<=", true)
        } else if self.eat("<!") {
            ("(?<!", true)
        } else {
            return Err("uses `(?…)` other than `(?:`, `(?P<name>` and look-around; write it without flags, \
                        conditions or references"
                .into());
        };
        self.looks_around |= around;
        self.open.push(around);
        self.emit(text, Before::Nothing);
        Ok(())
    }

    fn quantifier(&mut self, c: char) -> Result<(), String> {
        match (self.before, c) {
            (Before::Atom | Before::Group, _) => {
                self.out.push(c);
                // One more `?` makes it lazy; that is handled here so that `a??` stays one quantifier.
                if self.eat("?") {
                    self.out.push('?');
                }
                self.before = Before::Quantifier;
                Ok(())
            }
            (Before::Quantifier, '+') => Err("uses a possessive quantifier, which is not supported".into()),
            (Before::Quantifier, _) => Err(format!("repeats a repetition with `{c}`")),
            (Before::Nothing, _) => Err(format!("has nothing to repeat before `{c}`")),
        }
    }

    fn count(&mut self) -> Result<(), String> {
        if self.before != Before::Atom {
            return Err("counts repetitions `{…}` of something other than one character or class".into());
        }
        let end = self.rest.find('}').ok_or("has a `{` that is not closed; write `\\{` for the character")?;
        let body = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        let number = |text: &str| text.parse::<u32>().ok().filter(|&n| n <= REPEAT_MAX);
        let bad =
            || format!("has the count `{{{body}}}`; write {{m}}, {{m,}} or {{m,n}} with numbers up to {REPEAT_MAX}");
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let (low, high) = body.split_once(',').map_or((body, None), |(low, high)| (low, Some(high)));
        if !digits(low) || high.is_some_and(|high| !high.is_empty() && !digits(high)) {
            return Err(bad());
        }
        let low = number(low).ok_or_else(bad)?;
        let text = match high {
            None => format!("{{{low}}}"),
            Some("") => format!("{{{low},}}"),
            Some(high) => {
                let high = number(high).filter(|&high| high >= low).ok_or_else(bad)?;
                format!("{{{low},{high}}}")
            }
        };
        self.out.push_str(&text);
        if self.eat("?") {
            self.out.push('?');
        }
        self.before = Before::Quantifier;
        Ok(())
    }

    fn class(&mut self) -> Result<(), String> {
        self.out.push('[');
        if self.eat("^") {
            self.out.push('^');
        }
        let mut first = true;
        loop {
            let c = self.next().ok_or("has a `[` that is not closed")?;
            match c {
                ']' if first => return Err("has an empty set or one that starts with `]`; write `\\]`".into()),
                ']' => break,
                '[' => return Err("has a `[` within a set; write `\\[`".into()),
                '&' | '|' | '~' | '-' if self.rest.starts_with(c) => {
                    return Err(format!("has `{c}{c}` within a set, which engines read differently"));
                }
                '\\' => {
                    let escaped = self.next().ok_or("ends with a backslash")?;
                    match shorthand(escaped) {
                        Some(_) if self.rest.starts_with('-') && !self.rest.starts_with("-]") => {
                            return Err(format!("has a range that starts at `\\{escaped}`"));
                        }
                        Some(members) => self.out.push_str(members),
                        None if escaped.is_ascii_punctuation() => self.class_literal(escaped),
                        None => return Err(format!("has the escape `\\{escaped}` within a set")),
                    }
                }
                // A hyphen is a range when something stands on both sides; it means the same in both engines.
                '-' => self.out.push('-'),
                c => self.class_literal(c),
            }
            first = false;
        }
        self.emit("]", Before::Atom);
        Ok(())
    }

    fn class_literal(&mut self, c: char) {
        if matches!(c, '\\' | '^' | '-' | '[' | ']' | '&' | '~' | '|') {
            self.out.push('\\');
        }
        self.out.push(c);
    }

    fn escape(&mut self) -> Result<(), String> {
        let c = self.next().ok_or("ends with a backslash")?;
        match c {
            'A' => self.emit(r"\A", Before::Nothing),
            'Z' => self.emit(r"\z", Before::Nothing),
            'b' | 'B' => self.emit(if c == 'b' { r"\b" } else { r"\B" }, Before::Nothing),
            'W' => self.emit("[^0-9A-Za-z_]", Before::Atom),
            'D' => self.emit("[^0-9]", Before::Atom),
            'S' => self.emit(r"[^\t\n\r\x0b\x0c ]", Before::Atom),
            _ => match shorthand(c) {
                Some(members) => self.emit(&format!("[{members}]"), Before::Atom),
                None if c.is_ascii_punctuation() => self.literal(c),
                None => return Err(format!("has the escape `\\{c}`, which is not supported")),
            },
        }
        Ok(())
    }
}

/// The members of a class escape, on ASCII.
fn shorthand(c: char) -> Option<&'static str> {
    match c {
        'd' => Some("0-9"),
        'w' => Some("0-9A-Za-z_"),
        's' => Some(r"\t\n\r\x0b\x0c "),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = [
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.embed_tokens",
        "lm_head",
    ];

    /// Pattern, `re.fullmatch` and `re.match(rf"(.*\.)?({pattern})$")` on each name, as CPython 3.11 answers.
    const PYTHON: &[(&str, &str, &str)] = &[
        (r"q_proj", "00000", "11000"),
        (r".*q_proj", "11000", "11000"),
        (r".*\.(q|k)_proj", "11000", "11000"),
        (r"model\.layers\.[0-9]\..*", "10100", "10100"),
        (r"model\.layers\.\d{2}\..*", "01000", "01000"),
        (r"^model.*proj$", "11100", "11100"),
        (r"^.*1\.self_attn\.(?:q|v)_proj", "11000", "11000"),
        (r"(?!.*mlp).*proj", "11000", "11100"),
        (r".*(?<!1)1\.self.*", "10000", "10000"),
        (r"lm_head|.*embed_tokens", "00011", "00011"),
        (r"[^.]*", "00001", "11111"),
        (r".*\b1\b.*", "10100", "10100"),
        (r"(?P<m>model)\..*\w+", "11110", "11110"),
        (r".+?\.1\..+", "10100", "10100"),
        (r"model.layers.1.self_attn.q_proj", "10000", "10000"),
        (r"[\w.]{22}", "00000", "00000"),
        (r".*[\-_]proj", "11100", "11100"),
        (r"model\.(layers\.(1|2)\.)?(self_attn\.|mlp\.)?(q_proj|up_proj|embed_tokens)", "10110", "10110"),
        (
            r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)\.(?:q_proj))",
            "11100",
            "11100",
        ),
        (r"a?model.*", "11110", "11110"),
        (r".*\Z", "11111", "11111"),
        (r"\Amodel.*", "11110", "11110"),
        (r"", "00000", "00000"),
        (r".*layers\.1[^0-9].*", "10100", "10100"),
        (r".*[a-c]ttn.*", "11000", "11000"),
        (r"[.\w]+", "11111", "11111"),
        (r"(?=.*q_)(?=.*11).*", "01000", "01000"),
    ];

    fn answers(matcher: &Matcher<'_>) -> String {
        let one = |name| if matcher.matches(name).expect("within the step limit") { '1' } else { '0' };
        NAMES.into_iter().map(one).collect()
    }

    #[test]
    fn patterns_match_what_python_matches() {
        for &(source, full, suffix) in PYTHON {
            let pattern = Pattern::parse(source, &Limits::default()).expect(source);
            assert_eq!(answers(&pattern.full().expect(source)), full, "full match of {source}");
            assert_eq!(answers(&pattern.suffix().expect(source)), suffix, "suffix match of {source}");
        }
    }

    #[test]
    fn a_layers_pattern_stands_bare_in_its_expression_as_in_peft() {
        let one = Some(Some(1));
        for (source, expected) in [
            ("layers", [one, Some(Some(11)), one, None, None]),
            ("h|layers", [None; 5]),
            ("(h|layers)", [one, Some(Some(11)), one, None, None]),
            ("model.layers", [one, Some(Some(11)), one, None, None]),
            (r"lay\w+", [one, Some(Some(11)), one, None, None]),
            ("", [None; 5]),
        ] {
            let pattern = Pattern::parse(source, &Limits::default()).expect(source);
            let matcher = pattern.layer().expect(source);
            assert_eq!(NAMES.map(|name| matcher.index(name).expect("within the step limit")), expected, "{source}");
        }
    }

    #[test]
    fn what_engines_read_differently_is_refused() {
        for source in [
            r"(a)\1",
            r"(?P=x)",
            "(?i)q",
            "(?s:.)",
            "(?>a)",
            "(?#x)",
            "(?(1)a)",
            "a*+",
            "a**",
            "*a",
            "(*a)",
            "a|*",
            "^*",
            r"\b+",
            "(?=a)*",
            "a{1000}",
            "(a){3}",
            "a{2,1}",
            "a{,2}",
            "a{x}",
            "a{2}{3}",
            "a{1",
            "[a",
            "[]a]",
            "[^]a]",
            "[a&&b]",
            "[a--b]",
            "[a||b]",
            "[a~~b]",
            "[[:alpha:]]",
            r"[\b]",
            r"[\d-x]",
            r"\p{L}",
            r"\x41",
            r"\G",
            "(a",
            "a)",
            "a\\",
            "[a\\",
            "(?P<x",
        ] {
            let why = Pattern::parse(source, &Limits::default()).expect_err(source);
            assert!(why.contains("pattern `"), "{source}: {why}");
        }
        assert!(Pattern::parse(&"(".repeat(1_000), &Limits::default()).is_err());
        assert!(Pattern::parse(&"a".repeat(10_000), &Limits::default()).unwrap_err().contains("regex_bytes_max"));
    }

    #[test]
    fn a_catastrophic_pattern_runs_out_of_steps() {
        // Without look-around nested repetition is harmless: the engine is linear.
        let linear = Pattern::parse("(a*)*b", &Limits::default()).expect("parses");
        assert_eq!(linear.full().expect("compiles").matches(&"a".repeat(200)), Ok(false));
        let slow = Pattern::parse("((?=a)a*)*b", &Limits::default()).expect("parses");
        let why = slow.full().expect("compiles").matches(&"a".repeat(40)).expect_err("too slow");
        assert!(why.contains("steps"), "{why}");
    }
}
