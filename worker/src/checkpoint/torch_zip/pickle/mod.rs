//! A pickle of a state dict, read without executing anything.
//!
//! Pickle is a program for a stack machine, and Python's lets it call whatever it names. This one knows the
//! opcodes that `torch.save` writes for a dict of tensors (protocols 2 to 5, CPython's `pickletools`), and of
//! callables the handful that such a dict is made of, by name. Values live in flat arenas and refer to one
//! another by index: nothing recurses, and memory is at most proportional to the pickle's length.

/// What the values of a state dict mean.
mod objects;

use std::collections::{BTreeMap, HashMap};

pub(super) use objects::Tensor;
use objects::{Global, Rebuilt, Storage};

/// Most of what a pickle may make of one kind (memo entries, dict entries, items of tuples, tensors).
const MAX_OBJECTS: usize = 1 << 20;
/// Values on the stack; Python sets the items of a dict by the thousand.
const MAX_STACK: usize = 1 << 16;
/// Open marks, that is tuples and batches of items within one another; a state dict has three.
const MAX_MARKS: usize = 64;
/// Of a name that an error repeats.
const MAX_SHOWN_CHARS: usize = 80;

/// Why a pickle is refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("its pickle ends at byte {at}, in the middle: truncated; fetch or save it again")]
    Truncated { at: usize },
    #[error("its pickle has opcode {opcode:#04x} at byte {at}, which no state dict needs; {SAVE_AGAIN}")]
    Opcode { opcode: u8, at: usize },
    #[error(
        "its pickle asks for {global} at byte {at}, which is not part of a state dict, and was not executed; \
         {SAVE_AGAIN}"
    )]
    Global { global: String, at: usize },
    #[error("its pickle, at byte {at}: {rule}; {SAVE_AGAIN}")]
    Structure { rule: String, at: usize },
    #[error("its entry {name:?} is {found}, not a tensor; {SAVE_AGAIN}")]
    Entry { name: String, found: &'static str },
}

const SAVE_AGAIN: &str = "save the tensors alone, as torch.save(model.state_dict(), path) does";

/// The tensors of a pickled state dict, by name.
pub(super) fn state_dict(pickle: &[u8]) -> Result<BTreeMap<&str, Tensor<'_>>, Error> {
    Machine::new(pickle).run()
}

/// Indices are into the machine's arenas.
#[derive(Debug, Clone, Copy)]
enum Value<'p> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'p str),
    /// First item and length.
    Tuple(usize, usize),
    /// Its items are not kept: no tensor depends on them.
    List,
    Dict(usize),
    Global(Global),
    Storage(usize),
    Tensor(usize),
}

impl Value<'_> {
    fn kind(self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool => "a bool",
            Value::Int(_) => "an int",
            Value::Float => "a float",
            Value::Text(_) => "a string",
            Value::Tuple(..) => "a tuple",
            Value::List => "a list",
            Value::Dict(_) => "a dict",
            Value::Global(_) => "a class or function",
            Value::Storage(_) => "a storage",
            Value::Tensor(_) => "a tensor",
        }
    }
}

struct Machine<'p> {
    pickle: &'p [u8],
    at: usize,
    /// Where the opcode that is being executed stands.
    opcode_at: usize,
    stack: Vec<Value<'p>>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'p>>,
    items: Vec<Value<'p>>,
    dicts: usize,
    entries: Vec<(usize, Value<'p>, Value<'p>)>,
    storages: Vec<Storage<'p>>,
    tensors: Vec<Rebuilt>,
}

impl<'p> Machine<'p> {
    fn new(pickle: &'p [u8]) -> Self {
        Machine {
            pickle,
            at: 0,
            opcode_at: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            items: Vec::new(),
            dicts: 0,
            entries: Vec::new(),
            storages: Vec::new(),
            tensors: Vec::new(),
        }
    }

    fn run(mut self) -> Result<BTreeMap<&'p str, Tensor<'p>>, Error> {
        loop {
            self.opcode_at = self.at;
            match self.byte()? {
                // PROTO, FRAME: nothing depends on them.
                0x80 => drop(self.take(1)?),
                0x95 => drop(self.take(8)?),
                b'N' => self.push(Value::None)?,
                0x88 | 0x89 => self.push(Value::Bool)?,
                b'K' => {
                    let value = self.number(1)?;
                    self.push(Value::Int(value))?;
                }
                b'M' => {
                    let value = self.number(2)?;
                    self.push(Value::Int(value))?;
                }
                b'J' => {
                    let value = self.number(4)?;
                    self.push(Value::Int(i64::from(value as u32 as i32)))?;
                }
                0x8a => self.long1()?,
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Float)?;
                }
                b'X' => {
                    let bytes = self.number(4)? as usize;
                    self.text(bytes)?;
                }
                0x8c => {
                    let bytes = self.number(1)? as usize;
                    self.text(bytes)?;
                }
                b'(' => {
                    if self.marks.len() == MAX_MARKS {
                        return Err(self.refuse(format!("more than {MAX_MARKS} marks are open")));
                    }
                    self.marks.push(self.stack.len());
                }
                b')' => self.push(Value::Tuple(0, 0))?,
                b't' => {
                    let height = self.mark()?;
                    self.tuple(self.stack.len() - height)?;
                }
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b']' => self.push(Value::List)?,
                b'a' => {
                    self.pop()?;
                    self.list()?;
                }
                b'e' => {
                    let height = self.mark()?;
                    self.stack.truncate(height);
                    self.list()?;
                }
                b'}' => self.new_dict()?,
                b's' => {
                    let height = self.stack.len().saturating_sub(2);
                    self.set_items(height)?;
                }
                b'u' => {
                    let height = self.mark()?;
                    self.set_items(height)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.global(module, name)?;
                }
                0x93 => {
                    let (name, module) = (self.pop_text()?, self.pop_text()?);
                    self.global(module, name)?;
                }
                b'q' => {
                    let index = self.number(1)?;
                    self.remember(index as u32)?;
                }
                b'r' => {
                    let index = self.number(4)?;
                    self.remember(index as u32)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let index = self.number(1)?;
                    self.recall(index as u32)?;
                }
                b'j' => {
                    let index = self.number(4)?;
                    self.recall(index as u32)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                b'.' => return self.finish(),
                opcode => return Err(Error::Opcode { opcode, at: self.opcode_at }),
            }
        }
    }

    fn refuse(&self, rule: impl Into<String>) -> Error {
        Error::Structure { rule: rule.into(), at: self.opcode_at }
    }

    fn take(&mut self, bytes: usize) -> Result<&'p [u8], Error> {
        let end = self.at.saturating_add(bytes);
        let taken = self.pickle.get(self.at..end).ok_or(Error::Truncated { at: self.pickle.len() })?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned little-endian number of at most 4 bytes.
    fn number(&mut self, bytes: usize) -> Result<i64, Error> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |value, &byte| value << 8 | i64::from(byte)))
    }

    /// A signed number of as many bytes as its first says.
    fn long1(&mut self) -> Result<(), Error> {
        let bytes = usize::from(self.byte()?);
        let digits = self.take(bytes)?;
        if bytes > 8 {
            return Err(self.refuse(format!("a number of {bytes} bytes")));
        }
        let negative = digits.last().is_some_and(|&last| last >= 0x80);
        let mut value = [if negative { 0xff } else { 0 }; 8];
        value[..bytes].copy_from_slice(digits);
        self.push(Value::Int(i64::from_le_bytes(value)))
    }

    fn text(&mut self, bytes: usize) -> Result<(), Error> {
        let bytes = self.take(bytes)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.refuse("a string that is not UTF-8"))?;
        self.push(Value::Text(text))
    }

    /// Up to the next line break, which is taken as well.
    fn line(&mut self) -> Result<&'p str, Error> {
        let rest = &self.pickle[self.at..];
        let end = rest.iter().position(|&byte| byte == b'\n');
        let line = self.take(end.ok_or(Error::Truncated { at: self.pickle.len() })?)?;
        self.take(1)?;
        std::str::from_utf8(line).map_err(|_| self.refuse("a name that is not UTF-8"))
    }

    fn push(&mut self, value: Value<'p>) -> Result<(), Error> {
        if self.stack.len() == MAX_STACK {
            return Err(self.refuse(format!("more than {MAX_STACK} values are on the stack")));
        }
        self.stack.push(value);
        Ok(())
    }

    /// The topmost value above the last mark.
    fn pop(&mut self) -> Result<Value<'p>, Error> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let value = if self.stack.len() > floor { self.stack.pop() } else { None };
        value.ok_or_else(|| self.refuse("takes a value that is not there"))
    }

    fn pop_text(&mut self) -> Result<&'p str, Error> {
        match self.pop()? {
            Value::Text(text) => Ok(text),
            other => Err(self.refuse(format!("{} where a string belongs", other.kind()))),
        }
    }

    /// Closes the last mark: the height of the stack at which it was set.
    fn mark(&mut self) -> Result<usize, Error> {
        self.marks.pop().ok_or_else(|| self.refuse("there is no mark"))
    }

    fn room<T>(&self, arena: &[T], more: usize, what: &str) -> Result<(), Error> {
        match arena.len().saturating_add(more) <= MAX_OBJECTS {
            true => Ok(()),
            false => Err(self.refuse(format!("more than {MAX_OBJECTS} {what}"))),
        }
    }

    /// The topmost `len` values as one.
    fn tuple(&mut self, len: usize) -> Result<(), Error> {
        self.room(&self.items, len, "items of tuples")?;
        let first = self.items.len();
        for _ in 0..len {
            let value = self.pop()?;
            self.items.push(value);
        }
        self.items[first..].reverse();
        self.push(Value::Tuple(first, len))
    }

    /// A list must be topmost, and stays.
    fn list(&mut self) -> Result<(), Error> {
        match self.pop()? {
            Value::List => self.push(Value::List),
            other => Err(self.refuse(format!("{} where a list belongs", other.kind()))),
        }
    }

    fn new_dict(&mut self) -> Result<(), Error> {
        if self.dicts == MAX_OBJECTS {
            return Err(self.refuse(format!("more than {MAX_OBJECTS} dicts")));
        }
        self.dicts += 1;
        self.push(Value::Dict(self.dicts - 1))
    }

    /// Keys and values from `height` on into the dict below them.
    fn set_items(&mut self, height: usize) -> Result<(), Error> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if height < floor || !(self.stack.len() - height).is_multiple_of(2) {
            return Err(self.refuse("keys without values"));
        }
        let pairs = self.stack.split_off(height);
        let Value::Dict(dict) = self.pop()? else {
            return Err(self.refuse("items of something that is no dict"));
        };
        self.room(&self.entries, pairs.len() / 2, "items of dicts")?;
        self.entries.extend(pairs.as_chunks::<2>().0.iter().map(|&[key, value]| (dict, key, value)));
        self.push(Value::Dict(dict))
    }

    fn remember(&mut self, index: u32) -> Result<(), Error> {
        let value = self.pop()?;
        if self.memo.len() == MAX_OBJECTS {
            return Err(self.refuse(format!("more than {MAX_OBJECTS} memo entries")));
        }
        self.memo.insert(index, value);
        self.push(value)
    }

    fn recall(&mut self, index: u32) -> Result<(), Error> {
        let value = self.memo.get(&index).copied();
        self.push(value.ok_or_else(|| self.refuse(format!("memo entry {index} was never set")))?)
    }
}

#[cfg(test)]
mod tests;
