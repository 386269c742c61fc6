//! What chat templates may call: minijinja's filters and Python's methods, each charged by the size of what it is given
//! and, where the result can be larger by a factor (`replace`, `join`, `indent`, `format`), by the size of the result
//! before it is made; and the functions that transformers adds. Filters that no chat template uses and whose cost is not
//! linear (`batch`, `groupby`, …) are left out: a template that needs one gets an error that names it.

use minijinja::filters;
use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, functions};

use super::strftime::strftime;
use super::template_meter::{By, ENTRY_BYTES, Refusal, charge, charge_bytes};

/// What `*` becomes ([`super::template`]).
pub(super) const MULTIPLY: &str = "meter multiply";
const NOW: &str = "meter now";

/// Bytes of what `raise_exception` says that are passed on.
const RAISED_BYTES_MAX: usize = 1024;
/// Lists and maps inside each other that `tojson` writes, and the indentation of each.
const JSON_DEPTH_MAX: usize = 64;
const JSON_INDENT_MAX: usize = 16;

const REMOVED: [&str; 9] = ["batch", "slice", "chain", "zip", "groupby", "pprint", "sum", "unique", "urlencode"];

/// Charges for a call, given what it is called with.
type Price = fn(&mut State, &[Value]) -> Result<(), Error>;

pub(super) fn install(environment: &mut Environment<'static>) {
    for name in REMOVED {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
    macro_rules! add {
        ($price:expr, $($name:literal => $filter:path),+ $(,)?) => {
            $(environment.add_filter($name, metered(Value::from_function($filter), $price));)+
        };
    }
    // These look at an end, a length or a number.
    add!(price_of_nothing, "length" => filters::length, "count" => filters::length, "default" => filters::default,
        "d" => filters::default, "first" => filters::first, "last" => filters::last, "bool" => filters::bool,
        "int" => filters::int, "float" => filters::float, "abs" => filters::abs, "round" => filters::round,
        "attr" => filters::attr);
    add!(price_of_structure, "list" => filters::list, "items" => filters::items, "dictsort" => filters::dictsort,
        "reverse" => filters::reverse, "sort" => filters::sort, "min" => filters::min, "max" => filters::max,
        "map" => filters::map, "select" => filters::select, "reject" => filters::reject,
        "selectattr" => filters::selectattr, "rejectattr" => filters::rejectattr);
    add!(price_of_text, "safe" => filters::safe, "escape" => filters::escape, "e" => filters::escape,
        "lower" => filters::lower, "upper" => filters::upper, "title" => filters::title, "string" => filters::string,
        "capitalize" => filters::capitalize, "trim" => filters::trim, "split" => filters::split,
        "lines" => filters::lines);
    add!(price_of_replace, "replace" => filters::replace);
    add!(price_of_join, "join" => filters::join);
    add!(price_of_indent, "indent" => filters::indent);
    add!(price_of_format, "format" => filters::format);
    add!(price_of_text, "tojson" => to_json);

    environment.add_function("range", metered(Value::from_function(functions::range), price_of_range));
    environment.add_function("dict", metered(Value::from_function(functions::dict), price_of_structure));
    environment.add_function("namespace", metered(Value::from_function(functions::namespace), price_of_structure));
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function(MULTIPLY, |state: &mut State, args: Rest<Value>| match &args[..] {
        [left, right] => multiply(state, left, right),
        _ => Err(Error::from(ErrorKind::MissingArgument)),
    });
    environment.set_unknown_method_callback(call_method);
}

/// What a run's root context carries for `strftime_now`.
pub(super) fn settings(now_unix_s: i64) -> Option<(&'static str, Value)> {
    Some((NOW, Value::from(now_unix_s)))
}

fn metered(inner: Value, price: Price) -> impl Fn(&mut State, Rest<ValueOrKwargs>) -> Result<Value, Error> {
    move |state: &mut State, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        price(state, &args)?;
        let result = inner.call(state, &args)?;
        // A lazy view of a view of a view would be walked, and dropped, by recursion.
        if result.kind() != ValueKind::Iterable {
            return Ok(result);
        }
        charge(state, &result, By::Structure)?;
        Ok(Value::from(result.try_iter()?.collect::<Vec<_>>()))
    }
}

fn price_of_nothing(state: &mut State, _: &[Value]) -> Result<(), Error> {
    charge_bytes(state, 1)
}

fn price_of_structure(state: &mut State, args: &[Value]) -> Result<(), Error> {
    args.iter().try_for_each(|value| charge(state, value, By::Structure))
}

fn price_of_text(state: &mut State, args: &[Value]) -> Result<(), Error> {
    args.iter().try_for_each(|value| charge(state, value, By::Text))
}

fn price_of_range(state: &mut State, args: &[Value]) -> Result<(), Error> {
    let bound = |value: &Value| value.as_i64().unwrap_or(0).unsigned_abs();
    // The engine refuses ranges over 100 000 whatever they are charged.
    charge_bytes(state, args.iter().take(2).map(bound).max().unwrap_or(0).min(100_000) * ENTRY_BYTES)
}

fn price_of_replace(state: &mut State, args: &[Value]) -> Result<(), Error> {
    price_of_text(state, args)?;
    let [Some(text), Some(old), Some(new)] = [0, 1, 2].map(|index| args.get(index).and_then(Value::as_str)) else {
        return Ok(());
    };
    charge_bytes(state, product(text.matches(old).count(), new.len()))
}

fn price_of_join(state: &mut State, args: &[Value]) -> Result<(), Error> {
    price_of_text(state, args)?;
    let items = args.first().and_then(Value::len).unwrap_or(0);
    let separator = args.get(1).and_then(Value::as_str).map_or(0, str::len);
    charge_bytes(state, product(items, separator))
}

fn price_of_indent(state: &mut State, args: &[Value]) -> Result<(), Error> {
    price_of_text(state, args)?;
    let lines = args.first().and_then(Value::as_str).map_or(0, |text| text.matches('\n').count() + 1);
    // By position or by the name `width`.
    let named = args.last().filter(|last| last.is_kwargs()).and_then(|last| last.get_attr("width").ok());
    let width = |value: &Value| value.as_usize().unwrap_or_else(|| value.as_str().map_or(0, str::len));
    let widest = args.get(1).map(width).into_iter().chain(named.as_ref().map(width)).max().unwrap_or(0);
    charge_bytes(state, product(lines, widest))
}

/// Field widths and precisions, in printf's and in `str.format`'s language, are numbers in the format itself (the engine
/// has neither printf's `*` nor fields inside fields).
fn price_of_format(state: &mut State, args: &[Value]) -> Result<(), Error> {
    price_of_text(state, args)?;
    let format = args.first().and_then(Value::as_str).unwrap_or_default();
    let digits = format.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
    let widths = digits.map(|digits| digits.parse::<u64>().unwrap_or(u64::MAX));
    charge_bytes(state, widths.fold(0, u64::saturating_add))
}

fn product(a: usize, b: usize) -> u64 {
    (a as u64).saturating_mul(b as u64)
}

/// `*` with its result charged first. As the engine's own for numbers.
fn multiply(state: &mut State, left: &Value, right: &Value) -> Result<Value, Error> {
    let operands = || format!("tried to multiply {} by {}", left.kind(), right.kind());
    let impossible = || Error::new(ErrorKind::InvalidOperation, operands());
    if left.is_number() && right.is_number() {
        return match (left.as_i64(), right.as_i64()) {
            (Some(left), Some(right)) if left.checked_mul(right).is_some() => Ok(Value::from(left * right)),
            _ => Ok(Value::from(f64::try_from(left.clone())? * f64::try_from(right.clone())?)),
        };
    }
    let (value, times) = if left.is_number() { (right, left) } else { (left, right) };
    // As in Python, less than once is nothing.
    let times = times.as_i64().ok_or_else(impossible)?.max(0) as u64;
    charge(state, value, By::Structure)?;
    if let Some(text) = value.as_str() {
        charge_bytes(state, times.saturating_mul(text.len() as u64))?;
        return Ok(Value::from(text.repeat(times as usize)));
    }
    let (ValueKind::Seq | ValueKind::Iterable) = value.kind() else { return Err(impossible()) };
    let items: Vec<Value> = value.try_iter()?.collect();
    charge_bytes(state, times.saturating_mul(items.len() as u64 * ENTRY_BYTES))?;
    Ok(Value::from(std::iter::repeat_n(items, times as usize).flatten().collect::<Vec<_>>()))
}

/// Python's methods of texts, maps and lists.
fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let with_value = || std::iter::once(value).chain(args).cloned().collect::<Vec<_>>();
    match (value.kind(), method) {
        (ValueKind::String, "replace") => price_of_replace(state, &with_value())?,
        // `separator.join(items)` is `items|join(separator)`.
        (ValueKind::String, "join") => {
            let items: Vec<Value> = args.iter().take(1).chain([value]).cloned().collect();
            price_of_join(state, &items)?;
        }
        (ValueKind::String, "format") => price_of_format(state, &with_value())?,
        (ValueKind::String, _) => price_of_text(state, &with_value())?,
        (ValueKind::Seq, _) => price_of_structure(state, &with_value())?,
        _ => price_of_nothing(state, args)?,
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let mut message = message.as_str().unwrap_or("(no message)").to_owned();
    message.truncate(message.floor_char_boundary(RAISED_BYTES_MAX));
    Err(Refusal::Raised(message).into())
}

fn strftime_now(state: &mut State, format: &str) -> Result<String, Error> {
    charge_bytes(state, format.len() as u64 * 4)?;
    let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or(0);
    strftime(format, now).map_err(|directive| {
        let why = format!("strftime_now does not know the directive {directive}");
        Error::new(ErrorKind::InvalidOperation, why)
    })
}

/// Python's `json.dumps(ensure_ascii=False)`, which is what transformers gives templates: unlike minijinja's own filter it
/// escapes nothing for HTML and puts spaces after `,` and `:`.
fn to_json(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    let (value, indent, kwargs): (&Value, Option<usize>, Kwargs) = from_args(&args)?;
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<usize>>("indent")?,
    };
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let separators: Option<Value> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let separator = |index: usize, default: &str| {
        let given = separators.as_ref().and_then(|pair| pair.get_item_by_index(index).ok());
        given.and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_else(|| default.to_owned())
    };
    let between = separator(0, if indent.is_some() { "," } else { ", " });
    let (after_key, indent) = (separator(1, ": "), indent.map(|indent| indent.min(JSON_INDENT_MAX)));
    let mut json = Json { state, out: String::new(), charged: 0, indent, between, after_key, sort_keys, ensure_ascii };
    json.write(value, 0)?;
    Ok(Value::from(json.out))
}

struct Json<'a, 'template, 'env> {
    state: &'a mut State<'template, 'env>,
    out: String,
    /// Bytes of `out` that the budget has been charged for.
    charged: usize,
    indent: Option<usize>,
    between: String,
    after_key: String,
    sort_keys: bool,
    ensure_ascii: bool,
}

impl Json<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > JSON_DEPTH_MAX {
            return Err(Refusal::Depth.into());
        }
        charge_bytes(self.state, (self.out.len() - self.charged) as u64)?;
        self.charged = self.out.len();
        match (value.kind(), value.as_object()) {
            (ValueKind::None | ValueKind::Undefined, _) => self.out.push_str("null"),
            (ValueKind::Bool, _) => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            (ValueKind::Number, _) => self.out.push_str(&value.to_string()),
            (ValueKind::String, _) => self.string(value.as_str().unwrap_or_default()),
            (ValueKind::Map, Some(map)) => {
                let mut pairs: Vec<_> = map.try_iter_pairs().into_iter().flatten().collect();
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.items('{', '}', depth, pairs.into_iter().map(|(key, value)| (Some(key), value)))?;
            }
            (ValueKind::Seq | ValueKind::Iterable, Some(list)) => {
                let items: Vec<_> = list.try_iter().into_iter().flatten().collect();
                self.items('[', ']', depth, items.into_iter().map(|value| (None, value)))?;
            }
            (kind, _) => {
                let why = format!("{kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, why));
            }
        }
        Ok(())
    }

    fn items(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: impl ExactSizeIterator<Item = (Option<Value>, Value)>,
    ) -> Result<(), Error> {
        let empty = items.len() == 0;
        self.out.push(open);
        for (index, (key, value)) in items.enumerate() {
            if index > 0 {
                self.out.push_str(&self.between);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                self.string(&key.to_string());
                self.out.push_str(&self.after_key);
            }
            self.write(&value, depth + 1)?;
        }
        if !empty {
            self.line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                other if other < ' ' || (self.ensure_ascii && !other.is_ascii()) => {
                    let mut units = [0; 2];
                    for unit in other.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }
}
