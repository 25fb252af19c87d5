//! Chat templates in Jinja, with what Hugging Face's `apply_chat_template` gives them: `messages`, `bos_token` and its
//! like, `add_generation_prompt`, `raise_exception`, `tojson`, Python's methods of texts, lists and mappings, and
//! `{% generation %}` around what the assistant says.
//!
//! There is no `strftime_now`: what is learnt shall not depend on the day. Templates that look for it do without.

use std::collections::BTreeMap;
use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind};
use regex::Regex;
use serde::Serialize;
use tunefleet_proto::chat::Message;

use super::Error;

/// Instructions, and bytes of texts that are made on the way, that a rendering may take: far more than any template needs.
const FUEL: u64 = 16_000_000;
/// Longest text that a rendering may make.
const MAX_TEXT_BYTES: usize = 64 << 20;
const NAME: &str = "chat";

/// A template, ready to render.
#[derive(Debug)]
pub struct Template {
    name: String,
    source: String,
    environment: Environment<'static>,
    marks_generation: bool,
    /// `bos_token` and its like.
    special_names: BTreeMap<String, String>,
}

/// Characters that stand around what the assistant says in what is rendered.
#[derive(Debug, Clone, Copy)]
pub struct Brackets {
    pub open: char,
    pub close: char,
}

impl Template {
    /// Reads a template; `name` is what errors call it.
    pub fn new(name: String, source: &str, special_names: BTreeMap<String, String>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
            environment.set_syntax(syntax);
        }
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("generation", |text: String, open: String, close: String| {
            format!("{open}{text}{close}")
        });
        let (jinja, marks_generation) = with_generation(source);
        let compiled = environment.add_template_owned(NAME, jinja);
        compiled.map_err(|error| Error::Template { name: name.clone(), problem: problem(&error) })?;
        Ok(Template { name, source: source.to_owned(), environment, marks_generation, special_names })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether it says what the assistant says.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// The text of `messages`, whose contents are those of `contents`; what the assistant says between `brackets`.
    pub fn render(
        &self,
        messages: &[Message],
        contents: &[String],
        asks: bool,
        brackets: Brackets,
    ) -> Result<String, Error> {
        let failed =
            |error: &minijinja::Error| Error::Render { name: self.name.clone(), problem: problem(error) };
        let turn = |(message, content): (&Message, &String)| {
            Value::from_pairs([("role", message.role.name()), ("content", content.as_str())])
        };
        let turns: Vec<Value> = messages.iter().zip(contents).map(turn).collect();
        let template = self.environment.get_template(NAME).map_err(|error| failed(&error))?;
        let names =
            self.special_names.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let given = [
            ("messages", Value::from(turns)),
            ("add_generation_prompt", Value::from(asks)),
            ("generation_open", Value::from(brackets.open)),
            ("generation_close", Value::from(brackets.close)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        let mut text = Bounded(Vec::new());
        let given = Value::from_pairs(names.chain(given));
        template.render_captured_to(given, &mut text).map_err(|error| failed(&error))?;
        String::from_utf8(text.0).map_err(|error| Error::Render {
            name: self.name.clone(),
            problem: format!("what it made is no text: {error}"),
        })
    }
}

/// A text that may not grow without end.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_TEXT_BYTES {
            return Err(io::Error::other(format!(
                "it makes more than {MAX_TEXT_BYTES} bytes of one conversation"
            )));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The template with `system` at the beginning of conversations where the system says nothing.
pub fn with_system(source: &str, system: Option<&str>) -> String {
    let Some(system) = system else { return source.to_owned() };
    let text = serde_json::to_string(system).unwrap_or_default();
    format!(
        "{{%- if messages[0][\"role\"] != \"system\" -%}}{{%- set messages = [{{\"role\": \"system\", \"content\": {text}}}] \
         + messages -%}}{{%- endif -%}}\n{source}"
    )
}

/// Hugging Face's tags as blocks that this engine has, and whether there are any.
fn with_generation(source: &str) -> (String, bool) {
    let tag = |name: &str| Regex::new(&format!(r"\{{%([-+]?)\s*{name}\s*([-+]?)%\}}"));
    let (Ok(begin), Ok(end)) = (tag("generation"), tag("endgeneration")) else {
        return (source.to_owned(), false);
    };
    let marks = begin.is_match(source);
    let block = "{%$1 filter generation(generation_open, generation_close) $2%}";
    let source = begin.replace_all(source, block);
    (end.replace_all(&source, "{%$1 endfilter $2%}").into_owned(), marks)
}

/// What went wrong, and where.
fn problem(error: &minijinja::Error) -> String {
    let what = match error.kind() {
        ErrorKind::OutOfFuel => {
            format!("it takes more than {FUEL} steps for one conversation: does a loop have no end?")
        }
        _ => {
            let mut what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                what = format!("{what}: {cause}");
                source = cause.source();
            }
            what
        }
    };
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

/// As Python writes it: with spaces, and nothing escaped but what JSON must.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let json: serde_json::Value = serde_json::to_value(&value)
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    let mut out = Vec::new();
    let written = match indent {
        None => json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)),
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            json.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    Ok(String::from_utf8(out).unwrap_or_default())
}

/// `{"a": 1, "b": 2}`
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: Write + ?Sized>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
