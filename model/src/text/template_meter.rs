//! What a chat template has used: a budget of bytes, charged before each instruction that allocates or walks much.
//!
//! A value's *length* is what copying it takes: the bytes of a text, the entries of a list. Its *structure* is what
//! comparing it takes: all values inside. Its *text* is what printing it takes: all values with all their texts. A walk
//! that weighs a value stops as soon as the budget is used up, so weighing costs no more than what it guards.

use std::error::Error as StdError;
use std::fmt;

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State};
use openlora_types::Limits;

use super::TextError;

/// Function put around operands: returns its argument, charged by length. The space keeps templates from calling or
/// shadowing it.
pub(super) const WEIGH_LENGTH: &str = "meter weigh length";
/// The same, charged by structure.
pub(super) const WEIGH: &str = "meter weigh";
/// The same, charged by text.
pub(super) const WEIGH_TEXT: &str = "meter weigh text";
/// For a value that goes into a namespace: charged by length, and no namespace.
pub(super) const WEIGH_STORED: &str = "meter weigh stored";
const BUDGET: &str = "meter budget";

/// Times [`Limits::template_bytes_max`] that a run may touch: templates that build the text piece by piece in a variable
/// copy it about once for each message.
const BUDGET_FACTOR: u64 = 64;
/// What an entry of a list is charged for a copy: its bytes.
pub(super) const ENTRY_BYTES: u64 = 24;
/// What a value is charged for a visit, in the time it takes to copy that many bytes.
const VISIT_BYTES: u64 = 256;
/// Lists in lists. Dropping, comparing and printing a value recurse.
const DEPTH_MAX: usize = 64;

/// Bytes that are left.
struct Meter {
    left: u64,
}

/// Why a run was stopped by us; the source of the engine's error.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The budget is used up.
    Budget,
    /// Lists in lists in lists.
    Depth,
    /// A namespace inside a list, a map or a namespace.
    Nested,
    /// `raise_exception`.
    Raised(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Budget => write!(f, "it builds too much text"),
            Self::Depth => write!(f, "it nests lists deeper than {DEPTH_MAX}"),
            Self::Nested => write!(f, "it stores a namespace in another value"),
            Self::Raised(message) => f.write_str(message),
        }
    }
}

impl StdError for Refusal {}

impl Refusal {
    pub(super) fn explain(&self, limits: &Limits) -> TextError {
        match self {
            Self::Raised(message) => TextError::Refused(message.clone()),
            Self::Budget => TextError::TemplateLimit {
                what: "builds too much text",
                limit: "template_bytes_max",
                max: limits.template_bytes_max as u64,
            },
            Self::Depth | Self::Nested => TextError::Template(self.to_string()),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Error::new(ErrorKind::InvalidOperation, refusal.to_string()).with_source(refusal)
    }
}

/// How to weigh.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    Length,
    Structure,
    Text,
}

pub(super) fn install(environment: &mut Environment<'static>) {
    for (name, by) in [(WEIGH_LENGTH, By::Length), (WEIGH, By::Structure), (WEIGH_TEXT, By::Text)] {
        environment.add_function(name, move |state: &mut State, mut args: Rest<Value>| {
            let value = args.pop().unwrap_or_default();
            charge(state, &value, by).map(|()| value)
        });
    }
    let weigh_stored = |state: &mut State, mut args: Rest<Value>| {
        let value = args.pop().unwrap_or_default();
        if is_namespace(&value) {
            return Err(Refusal::Nested.into());
        }
        charge(state, &value, By::Length).map(|()| value)
    };
    environment.add_function(WEIGH_STORED, weigh_stored);
    environment.set_formatter(|out: &mut Output, state: &mut State, value: &Value| {
        charge(state, value, By::Text)?;
        match value.as_str() {
            Some(text) => out.write_str(text).map_err(Error::from),
            None => write!(out, "{value}").map_err(Error::from),
        }
    });
}

/// What a run's root context carries for [`charge`].
pub(super) fn settings(limits: &Limits) -> Option<(&'static str, Value)> {
    Some((BUDGET, Value::from((limits.template_bytes_max as u64).saturating_mul(BUDGET_FACTOR))))
}

/// Takes `bytes` off the budget.
pub(super) fn charge_bytes(state: &mut State, bytes: u64) -> Result<(), Error> {
    let meter = meter(state);
    meter.left = meter.left.checked_sub(bytes).ok_or(Refusal::Budget)?;
    Ok(())
}

/// Takes the weight of `value` off the budget.
pub(super) fn charge(state: &mut State, value: &Value, by: By) -> Result<(), Error> {
    let meter = meter(state);
    match (value.as_str(), by) {
        (Some(text), _) => meter.take(ENTRY_BYTES + text.len() as u64)?,
        (None, By::Length) => meter.take(ENTRY_BYTES * (1 + value.len().unwrap_or(0) as u64))?,
        (None, _) => meter.walk(value, by, 0)?,
    }
    Ok(())
}

fn meter<'a>(state: &'a mut State<'_, '_>) -> &'a mut Meter {
    if state.get_extension::<Meter>().is_none() {
        // Absent only if a caller forgot `settings`: then nothing may be used.
        let left = state.lookup(BUDGET).and_then(|budget| u64::try_from(budget).ok()).unwrap_or(0);
        return state.get_or_insert_extension(Meter { left });
    }
    state.get_extension_mut().expect("looked up above")
}

impl Meter {
    fn take(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.left = self.left.checked_sub(bytes).ok_or(Refusal::Budget)?;
        Ok(())
    }

    fn walk(&mut self, value: &Value, by: By, depth: usize) -> Result<(), Refusal> {
        if depth > DEPTH_MAX {
            return Err(Refusal::Depth);
        }
        if depth > 0 && is_namespace(value) {
            return Err(Refusal::Nested);
        }
        let text = value.as_str().map_or(0, |text| if by == By::Text { text.len() as u64 } else { 0 });
        self.take(VISIT_BYTES + text)?;
        match (value.kind(), value.as_object()) {
            (ValueKind::Map, Some(map)) => {
                for (key, value) in map.try_iter_pairs().into_iter().flatten() {
                    self.walk(&key, by, depth + 1)?;
                    self.walk(&value, by, depth + 1)?;
                }
            }
            (ValueKind::Seq | ValueKind::Iterable, Some(list)) => {
                for value in list.try_iter().into_iter().flatten() {
                    self.walk(&value, by, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Namespaces are the only values that change, so the only ones that could come to hold themselves, which would never be
/// freed. So nothing may hold one: lists and maps are walked when they are made, and namespaces when they are written to.
fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace"))
}
