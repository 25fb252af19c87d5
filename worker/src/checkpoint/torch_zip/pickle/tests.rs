//! Pickles as torch.save writes them, and others.

use proptest::prelude::*;

use super::objects::StorageClass;
use super::*;

/// A pickle of protocol 2.
fn pickle(parts: &[&[u8]]) -> Vec<u8> {
    [&[0x80, 2], parts.concat().as_slice()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [b"X", (text.len() as u32).to_le_bytes().as_slice(), text.as_bytes()].concat()
}

/// A call of `_rebuild_tensor_v2` for `shape`, as torch.save writes one.
fn tensor(class: &str, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let natural = |n: &u8| [b'K', *n];
    let tuple =
        |items: &[u8]| [b"(".as_slice(), &items.iter().flat_map(natural).collect::<Vec<u8>>(), b"t"].concat();
    let id = [text("storage"), format!("c{class}\n").into_bytes(), text("7"), text("cpu"), b"K\x0c".to_vec()];
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".as_slice(),
        &id.concat(),
        b"tQK\x02",
        &tuple(shape),
        &tuple(strides),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

fn dict_of(name: &str, value: &[u8]) -> Vec<u8> {
    pickle(&[b"}", &text(name), value, b"s."])
}

fn message(pickle: &[u8]) -> String {
    state_dict(pickle).unwrap_err().to_string()
}

#[test]
fn a_tensor_comes_with_its_storage_shape_and_strides() {
    let bytes = dict_of("w", &tensor("torch\nBFloat16Storage", &[2, 3], &[3, 1]));
    let found = state_dict(&bytes).unwrap();
    let expected = Tensor {
        key: "7",
        class: StorageClass { name: "BFloat16Storage", element_bytes: 2 },
        storage_elements: 12,
        offset: 2,
        shape: vec![2, 3],
        strides: vec![3, 1],
    };
    assert_eq!(found, [("w", expected)].into());
}

#[test]
fn a_later_entry_of_a_name_replaces_the_earlier_one() {
    let one = tensor("torch\nFloatStorage", &[1], &[1]);
    let two = tensor("torch\nFloatStorage", &[2], &[1]);
    let bytes = pickle(&[b"}(", &text("w"), &one, &text("w"), &two, b"u."]);
    assert_eq!(state_dict(&bytes).unwrap()["w"].shape, [2]);
}

#[test]
fn whatever_else_python_could_call_is_refused_by_name() {
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "getattr"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict.fromkeys"),
    ] {
        let call = [format!("c{module}\n{name}\n(").into_bytes(), text("id"), b"tR".to_vec()].concat();
        let error = message(&dict_of("w", &call));
        assert!(error.contains(&format!("{module}.{name}")) && error.contains("not executed"), "{error}");
        let stacked = pickle(&[&text(module), &text(name), b"\x93."]);
        assert!(message(&stacked).contains(&format!("{module}.{name}")));
    }
}

#[test]
fn opcodes_that_no_state_dict_needs_are_refused() {
    // INST, OBJ, NEWOBJ, PERSID, EXT1, POP, DUP, STRING, INT.
    for opcode in [b'i', b'o', 0x81, b'P', 0x82, b'0', b'2', b'S', b'I'] {
        let error = message(&pickle(&[b"}", &[opcode], b"1\n."]));
        assert!(error.contains(&format!("{opcode:#04x}")), "{error}");
    }
}

#[test]
fn calls_with_other_arguments_are_refused() {
    let whole = tensor("torch\nFloatStorage", &[2, 3], &[3, 1]);
    let cut = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        [&whole[..at], to, &whole[at + from.len()..]].concat()
    };
    let bad = [
        cut(b"K\x0ctQ", b"tQ"),                            // a storage without its length
        cut(b"K\x0ctQ", b"J\xff\xff\xff\xfftQ"),           // of a negative length
        cut(b"tQK\x02", b"tK\x02"),                        // a tuple in a storage's place
        cut(b"(K\x02K\x03t", b"(K\x02K\x03K\x01t"),        // more dimensions than strides
        cut(b"(K\x02K\x03t", b"(K\x02Nt"),                 // None for a size
        cut(b"(K\x02K\x03t", b"(K\x02J\xfe\xff\xff\xfft"), // a negative size
    ];
    for value in bad {
        let error = message(&dict_of("w", &value));
        assert!(error.contains("torch.save(model.state_dict()"), "{error}");
    }
    let nine = tensor("torch\nFloatStorage", &[1; 9], &[1; 9]);
    assert!(message(&dict_of("w", &nine)).contains("9 dimensions"));
}

#[test]
fn what_is_not_a_dict_of_tensors_is_refused_by_name() {
    assert!(message(&dict_of("epoch", b"K\x03")).contains("entry \"epoch\" is an int"));
    assert!(message(&dict_of("state_dict", b"}")).contains("entry \"state_dict\" is a dict"));
    assert!(message(&pickle(&[b"}K\x03N", b"s."])).contains("an int names an entry"));
    assert!(message(&pickle(&[b"]."])).contains("a list where a state dict belongs"));
    assert!(message(&pickle(&[b"."])).contains("not there"));
}

#[test]
fn a_dict_within_itself_is_refused_without_following_it() {
    let bytes = pickle(&[b"}q\x00", &text("self"), b"h\x00s."]);
    assert!(message(&bytes).contains("entry \"self\" is a dict"));
}

#[test]
fn nesting_stack_memo_and_items_have_limits() {
    let marks = vec![b'('; MAX_MARKS + 1];
    assert!(message(&pickle(&[&marks])).contains("marks"));
    let stack = vec![b'N'; MAX_STACK + 1];
    assert!(message(&pickle(&[&stack])).contains("on the stack"));
    let memo: Vec<u8> =
        (0..=MAX_OBJECTS as u32).flat_map(|i| [b"r", &i.to_le_bytes()[..]].concat()).collect();
    assert!(message(&pickle(&[b"}", &memo])).contains("memo entries"));
    let tuples = [b"NNN\x87q\x00]".as_slice(), &b"h\x00h\x00h\x00\x87a".repeat(MAX_OBJECTS / 3)].concat();
    assert!(message(&pickle(&[&tuples])).contains("items of tuples"));
    // A tuple within a tuple a million times over is a million indices, and no recursion.
    let deep = [b")".as_slice(), &vec![0x85; MAX_OBJECTS], b"."].concat();
    assert!(message(&pickle(&[&deep])).contains("a tuple where a state dict belongs"));
    assert!(message(&pickle(&[b"h\x05."])).contains("memo entry 5"));
    assert!(message(&pickle(&[b"\x8a\xff", &[0; 255], b"."])).contains("255 bytes"));
}

#[test]
fn a_pickle_cut_anywhere_is_refused() {
    let bytes = dict_of("w", &tensor("torch\nFloatStorage", &[2, 3], &[3, 1]));
    for len in 0..bytes.len() {
        assert!(state_dict(&bytes[..len]).is_err(), "cut at {len}");
    }
}

#[test]
fn long_numbers_are_signed() {
    for (bytes, value) in [
        (b"\x8a\x00".as_slice(), 0),
        (b"\x8a\x01\xff", -1),
        (b"\x8a\x02\xff\x00", 255),
        (b"\x8a\x05\x00\x00\x00\x00\x01", 1 << 32),
    ] {
        let mut machine = Machine::new(bytes);
        machine.byte().unwrap();
        machine.long1().unwrap();
        assert!(matches!(machine.stack[..], [Value::Int(found)] if found == value), "{bytes:?}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = state_dict(&bytes);
    }

    /// Only known opcodes, so that more than the first few are reached.
    #[test]
    fn arbitrary_programs_never_panic(
        opcodes in proptest::collection::vec(
            proptest::sample::select(b"NKMJXG()t\x85\x86\x87]ae}sucqrhjQRb\x88\x89\x8a\x8c\x93\x94\x95\x00\x01".to_vec()),
            0..400,
        )
    ) {
        let _ = state_dict(&opcodes);
    }

    #[test]
    fn mutated_pickles_never_panic(at in any::<prop::sample::Index>(), byte: u8) {
        let mut bytes = dict_of("w", &tensor("torch\nFloatStorage", &[2, 3], &[3, 1]));
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _ = state_dict(&bytes);
    }
}
