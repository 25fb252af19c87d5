//! The objects of a state dict: storages, tensors, and the dict itself, of the calls that a pickle asks for.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Error, MAX_SHOWN_CHARS, Machine, Value};

/// Dimensions of a tensor; weights have two.
const MAX_DIMENSIONS: usize = 8;

/// What a storage's elements are, by the name of its class in `torch`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct StorageClass {
    /// As in `FloatStorage`.
    pub(in super::super) name: &'static str,
    /// Bytes of one element.
    pub(in super::super) element_bytes: u64,
}

const STORAGE_CLASSES: [StorageClass; 12] = {
    const fn of(name: &'static str, element_bytes: u64) -> StorageClass {
        StorageClass { name, element_bytes }
    }
    [
        of("FloatStorage", 4),
        of("BFloat16Storage", 2),
        of("HalfStorage", 2),
        of("DoubleStorage", 8),
        of("BoolStorage", 1),
        of("ByteStorage", 1),
        of("CharStorage", 1),
        of("ShortStorage", 2),
        of("IntStorage", 4),
        of("LongStorage", 8),
        of("ComplexFloatStorage", 8),
        of("ComplexDoubleStorage", 16),
    ]
};

/// A tensor of a state dict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Tensor<'p> {
    /// Name of the storage's file in the archive.
    pub(in super::super) key: &'p str,
    /// What it holds.
    pub(in super::super) class: StorageClass,
    /// How much of it.
    pub(in super::super) storage_elements: u64,
    /// The tensor's first element in it.
    pub(in super::super) offset: u64,
    /// Its shape.
    pub(in super::super) shape: Vec<u64>,
    /// Elements from one index to the next, of each dimension.
    pub(in super::super) strides: Vec<u64>,
}

/// What a pickle may name.
#[derive(Debug, Clone, Copy)]
pub(super) enum Global {
    RebuildTensor,
    RebuildParameter,
    OrderedDict,
    Storage(StorageClass),
}

/// A storage, as a pickle names it.
pub(super) struct Storage<'p> {
    key: &'p str,
    class: StorageClass,
    elements: u64,
}

/// A tensor, as a pickle makes it.
pub(super) struct Rebuilt {
    storage: usize,
    offset: i64,
    /// Items of tuples.
    shape: Range<usize>,
    strides: Range<usize>,
}

impl<'p> Machine<'p> {
    /// A callable or class, by its full name.
    pub(super) fn global(&mut self, module: &str, name: &str) -> Result<(), Error> {
        let global = match (module, name) {
            ("torch._utils", "_rebuild_tensor_v2") => Some(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Global::RebuildParameter),
            ("collections", "OrderedDict") => Some(Global::OrderedDict),
            ("torch", _) => STORAGE_CLASSES.into_iter().find(|c| c.name == name).map(Global::Storage),
            _ => None,
        };
        let refuse = || {
            let full = format!("{module}.{name}");
            let shown = full.chars().take(MAX_SHOWN_CHARS).flat_map(char::escape_debug);
            Error::Global { global: shown.collect(), at: self.opcode_at }
        };
        self.push(Value::Global(global.ok_or_else(refuse)?))
    }

    /// `("storage", class, key, location, elements)` becomes a storage.
    pub(super) fn storage(&mut self) -> Result<(), Error> {
        let id = self.pop()?;
        let found = match self.tuple_items(id) {
            &[
                Value::Text("storage"),
                Value::Global(Global::Storage(class)),
                Value::Text(key),
                Value::Text(_),
                Value::Int(elements),
            ] => u64::try_from(elements).ok().map(|elements| Storage { key, class, elements }),
            _ => None,
        };
        let storage = found.ok_or_else(|| self.refuse("a persistent id that is no storage of tensors"))?;
        self.room(&self.storages, 1, "storages")?;
        self.storages.push(storage);
        self.push(Value::Storage(self.storages.len() - 1))
    }

    fn tuple_items(&self, value: Value<'p>) -> &[Value<'p>] {
        match value {
            Value::Tuple(first, len) => &self.items[first..first + len],
            _ => &[],
        }
    }

    /// Calls one of the known callables.
    pub(super) fn reduce(&mut self) -> Result<(), Error> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let made = match (callable, self.tuple_items(arguments)) {
            (Value::Global(Global::OrderedDict), []) => return self.new_dict(),
            (Value::Global(Global::RebuildParameter), [tensor @ Value::Tensor(_), _, _]) => Some(*tensor),
            (
                Value::Global(Global::RebuildTensor),
                &[
                    Value::Storage(storage),
                    Value::Int(offset),
                    Value::Tuple(shape, dimensions),
                    Value::Tuple(strides, stride_count),
                    Value::Bool,
                    Value::Dict(_),
                    ..,
                ],
            ) if stride_count == dimensions => {
                if dimensions > MAX_DIMENSIONS {
                    let rule =
                        format!("a tensor of {dimensions} dimensions; at most {MAX_DIMENSIONS} can be");
                    return Err(self.refuse(rule));
                }
                self.room(&self.tensors, 1, "tensors")?;
                let (shape, strides) = (shape..shape + dimensions, strides..strides + dimensions);
                self.tensors.push(Rebuilt { storage, offset, shape, strides });
                Some(Value::Tensor(self.tensors.len() - 1))
            }
            _ => None,
        };
        self.push(made.ok_or_else(|| self.refuse("a call with other arguments than torch.save writes"))?)
    }

    /// Attributes of a dict, as `_metadata` of modules' versions: no tensor depends on them.
    pub(super) fn build(&mut self) -> Result<(), Error> {
        self.pop()?;
        match self.pop()? {
            dict @ Value::Dict(_) => self.push(dict),
            other => Err(self.refuse(format!("attributes of {}", other.kind()))),
        }
    }

    /// The dict on top of the stack, all of whose entries are named tensors.
    pub(super) fn finish(mut self) -> Result<BTreeMap<&'p str, Tensor<'p>>, Error> {
        let top = match self.pop()? {
            Value::Dict(dict) => dict,
            other => return Err(self.refuse(format!("{} where a state dict belongs", other.kind()))),
        };
        let mut tensors = BTreeMap::new();
        for &(_, key, value) in self.entries.iter().filter(|(dict, ..)| *dict == top) {
            let Value::Text(name) = key else {
                return Err(self.refuse(format!("{} names an entry of the state dict", key.kind())));
            };
            let Value::Tensor(index) = value else {
                let name = name.chars().take(MAX_SHOWN_CHARS).collect();
                return Err(Error::Entry { name, found: value.kind() });
            };
            tensors.insert(name, self.resolve(&self.tensors[index])?);
        }
        Ok(tensors)
    }

    fn resolve(&self, tensor: &Rebuilt) -> Result<Tensor<'p>, Error> {
        let natural = |value: &Value<'_>| match value {
            Value::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        };
        let naturals =
            |range: &Range<usize>| self.items[range.clone()].iter().map(natural).collect::<Option<Vec<_>>>();
        let offset = u64::try_from(tensor.offset).ok();
        let (Some(offset), Some(shape), Some(strides)) =
            (offset, naturals(&tensor.shape), naturals(&tensor.strides))
        else {
            return Err(self.refuse("a tensor whose offset, shape or strides are no natural numbers"));
        };
        let storage = &self.storages[tensor.storage];
        Ok(Tensor {
            key: storage.key,
            class: storage.class,
            storage_elements: storage.elements,
            offset,
            shape,
            strides,
        })
    }
}
