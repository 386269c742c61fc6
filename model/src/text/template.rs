//! The Jinja engine behind [`super::ChatTemplate`], made safe to run on templates that nobody vouches for.
//!
//! minijinja counts instructions ("fuel"), which bounds loops but not what one instruction does: forty rounds of
//! `s = s ~ s` are a terabyte, and `[l, l]` nested forty times takes no memory but an age to print. So the compiled
//! template is rewritten before it runs. Around each instruction that can allocate or walk much, calls to a meter
//! ([`super::template_meter`]) are put, which charge the operands' size *before* the instruction runs against a budget
//! that is a fixed multiple of [`Limits::template_bytes_max`]. Filters, functions and methods are wrapped in the same way
//! ([`super::template_filters`]). What is left per instruction is a small constant, so fuel and budget together bound time
//! and memory.
//!
//! The rewriting needs minijinja's instructions, which it publishes as `unstable_machinery`: an upgrade may have to change
//! [`guard`], and the compiler will say so.

use std::collections::BTreeMap;

use minijinja::machinery::{
    CodeGenerator, Instruction, Instructions, Span, Token, eval, make_string_output, parse, tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use openlora_types::Limits;

use super::TextError;
use super::template_filters::{self, MULTIPLY};
use super::template_meter::{self, Refusal, WEIGH, WEIGH_LENGTH, WEIGH_STORED, WEIGH_TEXT};

/// Frames of loops, conditions and macros inside each other. Real templates use under twenty; each macro call is also a
/// level of this process's stack.
const RECURSION_MAX: usize = 200;

/// Links of one expression (`a + b + c…`, `x|f|g…`) and `elif`s of a template. The parser, the compiler and the syntax
/// tree's destructor recurse over them; the stack of a 2 MiB thread holds several times as many.
const LINKS_MAX: usize = 2_000;
const ELIFS_MAX: usize = 250;

/// A template that compiles, with everything it may call.
pub(super) struct Program {
    environment: Environment<'static>,
    source: String,
}

type Blocks<'source> = BTreeMap<&'source str, Instructions<'source>>;

impl Program {
    /// Checks `source` and keeps it.
    ///
    /// # Errors
    /// A template that does not compile, that loads other templates, or that is longer than what it may write.
    pub(super) fn new(source: String, limits: &Limits) -> Result<Self, TextError> {
        if source.len() > limits.template_bytes_max {
            let max = limits.template_bytes_max as u64;
            return Err(TextError::TemplateLimit { what: "is too long", limit: "template_bytes_max", max });
        }
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let mut environment = Environment::new();
        environment.set_syntax(syntax.build().map_err(|error| failed(&error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_recursion_limit(RECURSION_MAX);
        template_meter::install(&mut environment);
        template_filters::install(&mut environment);
        let program = Self { environment, source: without_generation_tags(&source) };
        program.check_tokens()?;
        program.compile()?;
        Ok(program)
    }

    /// Runs the template over `context`, at `now_unix_s`.
    ///
    /// # Errors
    /// What the template raised, what it did wrong, or the limit it ran into.
    pub(super) fn run(
        &self,
        context: Vec<(&str, Value)>,
        now_unix_s: i64,
        limits: &Limits,
    ) -> Result<String, TextError> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(limits.template_fuel));
        let (main, blocks) = self.compile()?;
        let hidden = template_meter::settings(limits).into_iter().chain(template_filters::settings(now_unix_s));
        let root = Value::from_pairs(context.into_iter().chain(hidden));
        let mut text = String::new();
        let mut out = make_string_output(&mut text);
        eval(&environment, &main, root, &blocks, &mut out, AutoEscape::None)
            .map_err(|error| explain(&error, limits))?;
        if text.len() > limits.template_bytes_max {
            let max = limits.template_bytes_max as u64;
            return Err(TextError::TemplateLimit { what: "writes too much", limit: "template_bytes_max", max });
        }
        Ok(text)
    }

    /// What must be seen before the parser sees the source.
    fn check_tokens(&self) -> Result<(), TextError> {
        let tokens = tokenize(&self.source, false, self.environment.syntax().clone());
        let tokens: Vec<_> = tokens.collect::<Result<_, _>>().map_err(|error| failed(&error))?;
        refuse_long_chains(&tokens)?;
        refuse_folded_repetition(&tokens)
    }

    /// The guarded instructions. They borrow the source, so they are made anew for each run; that takes tens of
    /// microseconds.
    fn compile(&self) -> Result<(Instructions<'_>, Blocks<'_>), TextError> {
        let syntax = self.environment.syntax().clone();
        let tree = parse(&self.source, "chat_template", syntax).map_err(|error| failed(&error))?;
        let mut generator = CodeGenerator::new("chat_template", &self.source);
        generator.compile_stmt(&tree);
        let (main, blocks) = generator.finish();
        let blocks =
            blocks.into_iter().map(|(name, code)| Ok((name, guard(&code)?))).collect::<Result<_, TextError>>()?;
        Ok((guard(&main)?, blocks))
    }
}

/// Puts the meter around what can grow. The stack's picture at each instruction stays what the original expects.
fn guard<'source>(code: &Instructions<'source>) -> Result<Instructions<'source>, TextError> {
    let originals = (0..).map_while(|index| code.get(index));
    let guarded: Vec<Vec<Instruction<'source>>> = originals.map(guarded).collect::<Result<_, _>>()?;
    // Where each original instruction starts now; jumps may also go to just past the end.
    let mut starts = Vec::with_capacity(guarded.len() + 1);
    let mut next = 0;
    for group in &guarded {
        starts.push(next);
        next += group.len() as u32;
    }
    starts.push(next);
    let mut result = Instructions::new(code.name(), code.source());
    for (index, mut instruction) in
        guarded.into_iter().enumerate().flat_map(|(i, group)| group.into_iter().map(move |x| (i, x)))
    {
        match &mut instruction {
            Instruction::Iterate(target)
            | Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::BuildMacro(_, target, _) => *target = starts[*target as usize],
            _ => {}
        }
        let line = code.get_line(index as u32).and_then(|line| u16::try_from(line).ok());
        result.add_with_line(instruction, line.unwrap_or(0));
    }
    Ok(result)
}

fn guarded<'source>(instruction: &Instruction<'source>) -> Result<Vec<Instruction<'source>>, TextError> {
    use Instruction as I;
    let weigh = || I::CallFunction(WEIGH, Some(1));
    let weigh_length = || I::CallFunction(WEIGH_LENGTH, Some(1));
    let original = || instruction.clone();
    Ok(match instruction {
        // As a value, so that all output passes the meter's formatter.
        I::EmitRaw(text) => vec![I::LoadConst(Value::from(*text)), I::Emit],
        // Both operands, before.
        I::Add => vec![weigh_length(), I::Swap, weigh_length(), I::Swap, original()],
        I::StringConcat => {
            let weigh_text = || I::CallFunction(WEIGH_TEXT, Some(1));
            vec![weigh_text(), I::Swap, weigh_text(), I::Swap, original()]
        }
        I::In | I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte | I::CompareAndPreserve(_) => {
            vec![weigh(), I::Swap, weigh(), I::Swap, original()]
        }
        // The result is larger than the operands by a factor.
        I::Mul => vec![I::CallFunction(MULTIPLY, Some(2))],
        // The result is no larger than what it is made from; it is weighed so that there cannot be many.
        I::Slice => vec![original(), weigh_length()],
        I::BuildList(_) | I::BuildTuple(_) | I::BuildMap(_) => vec![original(), weigh()],
        // The stack has the value below the namespace.
        I::SetAttr(_) => vec![I::Swap, I::CallFunction(WEIGH_STORED, Some(1)), I::Swap, original()],
        I::UnpackLists(_) => return Err(TextError::Template("`*` before a list is not supported".into())),
        I::Include(_) | I::LoadBlocks => {
            return Err(TextError::Template("it loads another template, and there is none".into()));
        }
        _ => vec![original()],
    })
}

/// More operators, names and brackets in one tag than the stack can hold.
fn refuse_long_chains(tokens: &[(Token<'_>, Span)]) -> Result<(), TextError> {
    let (mut links, mut elifs) = (0, 0);
    for (token, span) in tokens {
        match token {
            Token::BlockStart | Token::VariableStart => links = 0,
            Token::Comma | Token::Colon | Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Float(_) => {}
            Token::Ident("elif") => elifs += 1,
            _ => links += 1,
        }
        if links > LINKS_MAX || elifs > ELIFS_MAX {
            let why = format!("line {}: over {LINKS_MAX} links in one tag, or over {ELIFS_MAX} elifs", span.start_line);
            return Err(TextError::Template(why));
        }
    }
    Ok(())
}

/// minijinja multiplies constants while compiling, where no meter runs: `'x' * 100000000` would be 100 MB before the
/// first check. Chat templates repeat a text by a variable if at all, so repeating one by a number is refused.
fn refuse_folded_repetition(tokens: &[(Token<'_>, Span)]) -> Result<(), TextError> {
    for (index, (token, span)) in tokens.iter().enumerate() {
        if !matches!(token, Token::Mul) {
            continue;
        }
        let left = operand(tokens[..index].iter().rev().map(|(token, _)| token));
        let right = operand(tokens[index + 1..].iter().map(|(token, _)| token));
        if matches!((left, right), (Operand::Text, Operand::Text | Operand::Number) | (Operand::Number, Operand::Text))
        {
            let line = span.start_line;
            return Err(TextError::Template(format!("line {line} multiplies a constant text or list; write it out")));
        }
    }
    Ok(())
}

/// What stands beside a `*`, as far as its tokens tell.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    /// A number, or a bracket around nothing but numbers and operators.
    Number,
    /// A text or list, or a bracket around one.
    Text,
    /// Something with a name in it, which is not folded.
    Variable,
}

/// Classifies the operand that `tokens`, going away from the `*`, begin with.
fn operand<'a, 'source: 'a>(tokens: impl Iterator<Item = &'a Token<'source>>) -> Operand {
    /// To the lexer these are names like any other.
    const WORDS: [&str; 17] = [
        "if", "elif", "else", "and", "or", "not", "in", "is", "set", "do", "for", "true", "True", "false", "False",
        "none", "None",
    ];
    let name = |token: &Token<'_>| matches!(token, Token::Ident(name) if !WORDS.contains(name));
    let open = |token: &Token<'_>| matches!(token, Token::ParenOpen | Token::BracketOpen | Token::BraceOpen);
    let close = |token: &Token<'_>| matches!(token, Token::ParenClose | Token::BracketClose | Token::BraceClose);
    let texts = |token: &Token<'_>| {
        let list = matches!(token, Token::BracketOpen | Token::BracketClose | Token::BraceOpen | Token::BraceClose);
        list || matches!(token, Token::Str(_) | Token::String(_) | Token::Comma)
    };
    let mut tokens = tokens.skip_while(|token| matches!(token, Token::Minus | Token::Plus)).peekable();
    let (mut depth, mut kind) = (0_i32, Operand::Number);
    // To the left a bracket is entered at its closing end.
    let entering = if tokens.peek().is_some_and(|token| close(token)) { -1 } else { 1 };
    for token in tokens.by_ref() {
        if name(token) {
            return Operand::Variable;
        }
        if texts(token) {
            kind = Operand::Text;
        }
        depth += entering * (i32::from(open(token)) - i32::from(close(token)));
        if depth <= 0 {
            break;
        }
    }
    // A name before a bracket calls or indexes.
    if entering < 0 && tokens.peek().is_some_and(|token| name(token) || close(token)) {
        Operand::Variable
    } else {
        kind
    }
}

/// `{% generation %}` marks the assistant's words for training and means nothing here; it becomes a block that always
/// runs, so that whitespace control stays what it was.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        match tag.trim_matches(|c| "{%}-+ \t\r\n".contains(c)) {
            name @ ("generation" | "endgeneration") => {
                let replacement = if name == "generation" { "if true" } else { "endif" };
                out.push_str(&tag.replace(name, replacement));
            }
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

fn failed(error: &minijinja::Error) -> TextError {
    TextError::Template(error.to_string())
}

/// Finds out why a run ended: the meter's refusals and fuel are wrapped in the errors of the calls they happened in.
fn explain(error: &minijinja::Error, limits: &Limits) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(refusal) = current.downcast_ref::<Refusal>() {
            return refusal.explain(limits);
        }
        if current.downcast_ref::<minijinja::Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            let max = limits.template_fuel;
            return TextError::TemplateLimit { what: "does not end in time", limit: "template_fuel", max };
        }
        cause = current.source();
    }
    failed(error)
}
