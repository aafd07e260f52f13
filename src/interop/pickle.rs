//! A reader for the pickles that `torch.save` writes for a state dict. Nothing is executed.
//!
//! A pickle is a program for a stack machine, and Python's can call any function. This one knows
//! the instructions that dictionaries of tensors need, and of functions only the names in
//! [`Global`]; a call of one makes a description of a tensor. Everything else is refused by name.
//!
//! Values live in one list and refer to each other by number, so that neither a cycle nor a value
//! nested a million times is a problem. Every instruction makes at most one value: memory is
//! proportional to the pickle, whose size is limited.

use std::collections::HashMap;
use std::ops::Range;

use super::shown;
use super::tensor::Format;

/// Largest pickle that is read; that of a 2.8B model has 100 kB.
pub(super) const MOST_BYTES: u64 = 4 << 20;

/// Most tensors of a state dict.
const MOST_TENSORS: usize = 100_000;

/// Most dimensions of a tensor.
const MOST_DIMENSIONS: usize = 8;

/// Number of a value.
type Id = u32;

/// What a pickle may refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Global {
    /// `collections.OrderedDict`
    Dict,
    /// `torch._utils._rebuild_tensor_v2`
    Tensor,
    /// `torch._utils._rebuild_parameter`
    Parameter,
    /// `torch.FloatStorage` and its like
    Storage(Format),
}

/// A value of the pickle.
#[derive(Clone, Debug)]
enum Value {
    None,
    Bool,
    Float,
    Int(i64),
    /// UTF-8, checked, in the pickle.
    Text(Range<usize>),
    Tuple(Vec<Id>),
    List,
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage(Box<Storage>),
    Tensor(Box<Tensor>),
}

/// Bytes that tensors are in: a file of the archive, whose name is a text of the pickle.
#[derive(Clone, Debug)]
struct Storage {
    key: Range<usize>,
    format: Format,
}

#[derive(Clone, Debug)]
struct Tensor {
    storage: Storage,
    offset: u64,
    shape: Vec<u64>,
    strides: Vec<u64>,
}

/// A tensor as the pickle describes it; not yet compared with what is in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pickled {
    /// The archive's file that it is in.
    pub(super) key: String,
    pub(super) format: Format,
    /// First element.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    /// Elements between neighbours of each dimension.
    pub(super) strides: Vec<u64>,
}

/// Names of the entries of a dictionary that some programs save the state dict in.
const WRAPPERS: [&str; 4] = ["state_dict", "model_state_dict", "model", "module"];

/// The tensors of a pickled state dict with their names, in its order.
pub(super) fn state_dict(bytes: &[u8]) -> Result<Vec<(String, Pickled)>, String> {
    let mut machine = Machine::new(bytes);
    let top = machine.run().map_err(|problem| {
        format!(
            "has a pickle that is not a state dict: {problem}, at byte {}",
            machine.at
        )
    })?;
    let Value::Dict(entries) = machine.value(top) else {
        return Err("has a pickle that is not a dictionary of tensors".to_owned());
    };
    let tensors = machine.tensors(entries)?;
    if !tensors.is_empty() {
        return Ok(tensors);
    }
    for (key, value) in entries {
        if let (Value::Text(key), Value::Dict(inner)) = (machine.value(*key), machine.value(*value))
            && WRAPPERS.contains(&machine.text(key))
        {
            return machine.tensors(inner);
        }
    }
    Err("has a pickle without tensors".to_owned())
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Heights of the stack where a group begins.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        }
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    fn text(&self, range: &Range<usize>) -> &'a str {
        std::str::from_utf8(&self.bytes[range.clone()]).unwrap_or_default()
    }

    /// Runs the program; returns its result.
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let opcode = self.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.execute(opcode)?;
        }
    }

    fn execute(&mut self, opcode: u8) -> Result<(), String> {
        match opcode {
            // PROTO and FRAME say how to read what follows, which the bytes say themselves.
            0x80 => self.take(1).map(drop),
            0x95 => self.take(8).map(drop),
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool),
            b'G' => {
                self.take(8)?;
                self.push(Value::Float)
            }
            b'K' => {
                let number = self.byte()?;
                self.push(Value::Int(number.into()))
            }
            b'M' => {
                let number = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))
            }
            b'J' => {
                let number = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(number.into()))
            }
            0x8a => {
                let number = self.long()?;
                self.push(Value::Int(number))
            }
            0x8c => {
                let length = self.byte()?;
                self.push_text(length.into())
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.push_text(length.into())
            }
            0x8d => {
                let length = u64::from_le_bytes(self.array()?);
                self.push_text(length)
            }
            b'(' => {
                self.marks.push(self.stack.len());
                Ok(())
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            0x85..=0x87 => self.tuple(usize::from(opcode - 0x84)),
            b't' => {
                let items = self.group()?;
                self.push(Value::Tuple(items))
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.add_entries(&[key, value])
            }
            b'u' => {
                let items = self.group()?;
                self.add_entries(&items)
            }
            b']' => self.push(Value::List),
            b'a' => self.pop().map(drop),
            b'e' => self.group().map(drop),
            b'q' | b'r' | 0x94 => self.remember(opcode),
            b'h' | b'j' => self.recall(opcode),
            b'c' | 0x93 => self.global(opcode),
            b'Q' => self.storage(),
            b'R' => self.call(),
            // A dictionary's attributes, such as the versions of modules: not needed.
            b'b' => self.pop().map(drop),
            other => Err(format!(
                "the instruction 0x{other:02x} is not one that `torch.save` uses for tensors"
            )),
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let bytes = self.bytes[self.at..].get(..count).ok_or("it ends early")?;
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?
            .try_into()
            .map_err(|_| "it ends early".to_owned())
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.array::<1>().map(|[byte]| byte)
    }

    /// An integer of up to eight bytes, in two's complement.
    fn long(&mut self) -> Result<i64, String> {
        let count = self.byte()?;
        let bytes = self.take(count.into())?;
        if bytes.len() > 8 {
            return Err(format!("an integer of {count} bytes"));
        }
        let negative = bytes.last().is_some_and(|last| *last >= 0x80);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(wide))
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        // At most one for each byte of the pickle, which are fewer than u32 holds.
        let id = self.values.len() as Id;
        self.values.push(value);
        self.stack.push(id);
        Ok(())
    }

    fn push_text(&mut self, length: u64) -> Result<(), String> {
        let length = usize::try_from(length).map_err(|_| "it ends early")?;
        let from = self.at;
        let bytes = self.take(length)?;
        std::str::from_utf8(bytes).map_err(|_| "a text that is not UTF-8")?;
        self.push(Value::Text(from..from + length))
    }

    /// Takes the top value; values before the last mark belong to another group.
    fn pop(&mut self) -> Result<Id, String> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= bottom {
            return Err("it takes a value where there is none".to_owned());
        }
        self.stack.pop().ok_or_else(|| "no value".to_owned())
    }

    /// Takes all values since the last mark.
    fn group(&mut self) -> Result<Vec<Id>, String> {
        let from = self.marks.pop().ok_or("it ends a group that never began")?;
        Ok(self.stack.split_off(from))
    }

    fn tuple(&mut self, count: usize) -> Result<(), String> {
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            items.push(self.pop()?);
        }
        items.reverse();
        self.push(Value::Tuple(items))
    }

    fn top(&self) -> Result<Id, String> {
        self.stack
            .last()
            .copied()
            .ok_or_else(|| "it needs a value where there is none".to_owned())
    }

    /// Adds keys and values, one after the other, to the dictionary on top.
    fn add_entries(&mut self, items: &[Id]) -> Result<(), String> {
        let top = self.top()?;
        let Value::Dict(entries) = &mut self.values[top as usize] else {
            return Err("it adds entries to what is not a dictionary".to_owned());
        };
        if !items.len().is_multiple_of(2) {
            return Err("it adds a key without a value".to_owned());
        }
        entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        Ok(())
    }

    fn remember(&mut self, opcode: u8) -> Result<(), String> {
        let slot = match opcode {
            b'q' => self.byte()?.into(),
            b'r' => u32::from_le_bytes(self.array()?),
            _ => self.memo.len() as u32,
        };
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, opcode: u8) -> Result<(), String> {
        let slot = match opcode {
            b'h' => self.byte()?.into(),
            _ => u32::from_le_bytes(self.array()?),
        };
        let id = self
            .memo
            .get(&slot)
            .ok_or("it recalls what it never stored")?;
        self.stack.push(*id);
        Ok(())
    }

    /// Something of Python, by name: the one place that decides what there is.
    fn global(&mut self, opcode: u8) -> Result<(), String> {
        let (module, name) = match opcode {
            b'c' => (self.line()?, self.line()?),
            _ => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.value(module), self.value(name)) {
                    (Value::Text(module), Value::Text(name)) => {
                        (self.text(module), self.text(name))
                    }
                    _ => return Err("it names something not by a text".to_owned()),
                }
            }
        };
        let global = match (module, name) {
            ("collections", "OrderedDict") => Global::Dict,
            ("torch._utils", "_rebuild_tensor_v2") => Global::Tensor,
            ("torch._utils", "_rebuild_parameter") => Global::Parameter,
            ("torch" | "torch.storage" | "torch.cuda", name) => match Format::of_storage(name) {
                Some(format) => Global::Storage(format),
                None => return Err(refusal(module, name)),
            },
            (module, name) => return Err(refusal(module, name)),
        };
        self.push(Value::Global(global))
    }

    /// Bytes up to the end of a line.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let length = rest
            .iter()
            .take(256)
            .position(|byte| *byte == b'\n')
            .ok_or("a name of more than 255 bytes")?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| "a name that is not UTF-8".to_owned())
    }

    /// A reference to a file of the archive: `("storage", type, key, device, length)`.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let found = match self.value(id) {
            Value::Tuple(items) => match items[..] {
                [kind, class, key, _, _] => {
                    match (self.value(kind), self.value(class), self.value(key)) {
                        (
                            Value::Text(kind),
                            Value::Global(Global::Storage(format)),
                            Value::Text(key),
                        ) if self.text(kind) == "storage" => Some((*format, key.clone())),
                        _ => None,
                    }
                }
                _ => None,
            },
            _ => None,
        };
        let (format, key) = found.ok_or("a reference that is not to a storage")?;
        if key.len() > 255 {
            return Err("a storage with a name of more than 255 bytes".to_owned());
        }
        self.push(Value::Storage(Box::new(Storage { key, format })))
    }

    /// A function with its arguments.
    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let Value::Tuple(arguments) = self.value(arguments) else {
            return Err("it calls something without a tuple of arguments".to_owned());
        };
        let result = match (self.value(function), &arguments[..]) {
            (Value::Global(Global::Dict), []) => Value::Dict(Vec::new()),
            (Value::Global(Global::Tensor), [storage, offset, shape, strides, ..]) => {
                self.tensor([*storage, *offset, *shape, *strides])?
            }
            (Value::Global(Global::Parameter), [tensor, ..]) => match self.value(*tensor) {
                Value::Tensor(_) => {
                    let tensor = *tensor;
                    self.stack.push(tensor);
                    return Ok(());
                }
                _ => return Err("a parameter of what is not a tensor".to_owned()),
            },
            (Value::Global(global), arguments) => {
                let count = arguments.len();
                return Err(format!("it calls {global:?} with {count} arguments"));
            }
            _ => return Err("it calls what is not a function".to_owned()),
        };
        self.push(result)
    }

    fn tensor(&self, [storage, offset, shape, strides]: [Id; 4]) -> Result<Value, String> {
        let Value::Storage(storage) = self.value(storage) else {
            return Err("a tensor without a storage".to_owned());
        };
        Ok(Value::Tensor(Box::new(Tensor {
            storage: (**storage).clone(),
            offset: self.count(offset)?,
            shape: self.counts(shape)?,
            strides: self.counts(strides)?,
        })))
    }

    fn count(&self, id: Id) -> Result<u64, String> {
        match self.value(id) {
            Value::Int(number) => {
                u64::try_from(*number).map_err(|_| format!("a tensor with the size {number}"))
            }
            _ => Err("a tensor with a size that is not an integer".to_owned()),
        }
    }

    fn counts(&self, id: Id) -> Result<Vec<u64>, String> {
        match self.value(id) {
            Value::Tuple(items) if items.len() <= MOST_DIMENSIONS => {
                items.iter().map(|id| self.count(*id)).collect()
            }
            Value::Tuple(items) => Err(format!("a tensor of {} dimensions", items.len())),
            _ => Err("a tensor whose shape is not a tuple".to_owned()),
        }
    }

    /// The tensors among the entries of a dictionary.
    fn tensors(&self, entries: &[(Id, Id)]) -> Result<Vec<(String, Pickled)>, String> {
        let mut tensors = Vec::new();
        for (key, value) in entries {
            if let (Value::Text(name), Value::Tensor(tensor)) =
                (self.value(*key), self.value(*value))
            {
                let name = self.text(name);
                if name.len() > 1024 {
                    return Err("has a tensor with a name of more than 1024 bytes".to_owned());
                }
                if tensors.len() == MOST_TENSORS {
                    return Err(format!("has more than {MOST_TENSORS} tensors"));
                }
                let tensor = Pickled {
                    key: self.text(&tensor.storage.key).to_owned(),
                    format: tensor.storage.format,
                    offset: tensor.offset,
                    shape: tensor.shape.clone(),
                    strides: tensor.strides.clone(),
                };
                tensors.push((name.to_owned(), tensor));
            }
        }
        Ok(tensors)
    }
}

fn refusal(module: &str, name: &str) -> String {
    format!(
        "it refers to `{}.{}`, which a state dict of tensors does not need; nothing of a \
         pickle is executed here",
        shown(module),
        shown(name)
    )
}
