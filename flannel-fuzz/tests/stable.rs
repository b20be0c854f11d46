//! The targets on a stable Rust: the committed corpus and mutations of it, from a fixed seed.
#![allow(missing_docs, reason = "tests")]

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::panic::catch_unwind;

use flannel_core::stable_hash;
use flannel_fuzz::corpus::{self, Entry};
use flannel_fuzz::{TARGETS, Target, seeds, target};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

/// So many mutated inputs for each case of an ordinary property.
const INPUTS_PER_CASE: u32 = 150;

/// One step from an entry of the corpus to something that nobody wrote.
#[derive(Debug, Clone)]
enum Mutation {
    /// A bit is turned over.
    Flip(prop::sample::Index, u8),
    /// A byte becomes another.
    Set(prop::sample::Index, u8),
    /// Bytes are put in.
    Insert(prop::sample::Index, Vec<u8>),
    /// A word of the target's is put in.
    Word(prop::sample::Index, prop::sample::Index),
    /// Bytes are taken out.
    Remove(prop::sample::Index, usize),
    /// The end is cut off.
    Truncate(prop::sample::Index),
    /// The end is that of another entry.
    Splice(
        prop::sample::Index,
        prop::sample::Index,
        prop::sample::Index,
    ),
    /// A part comes twice.
    Repeat(prop::sample::Index, prop::sample::Index),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<prop::sample::Index>;
    // Lengths and flags live on such bytes.
    let byte = || {
        prop_oneof![
            any::<u8>(),
            prop::sample::select(vec![0, 1, 3, 4, 0x7f, 0x80, 0xff])
        ]
    };
    prop_oneof![
        4 => (at(), 0..8_u8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        4 => (at(), byte()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        2 => (at(), prop::collection::vec(byte(), 1..5)).prop_map(|(at, b)| Mutation::Insert(at, b)),
        4 => (at(), at()).prop_map(|(at, word)| Mutation::Word(at, word)),
        2 => (at(), 1..9_usize).prop_map(|(at, count)| Mutation::Remove(at, count)),
        1 => at().prop_map(Mutation::Truncate),
        2 => (at(), at(), at()).prop_map(|(at, of, from)| Mutation::Splice(at, of, from)),
        1 => (at(), at()).prop_map(|(from, to)| Mutation::Repeat(from, to)),
    ]
}

fn apply(mutation: &Mutation, bytes: &mut Vec<u8>, corpus: &[Entry], words: &[&str]) {
    // A place between two bytes; the end is one.
    let place = |at: &prop::sample::Index, bytes: &[u8]| at.index(bytes.len() + 1);
    match mutation {
        Mutation::Flip(at, bit) if !bytes.is_empty() => {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        Mutation::Set(at, byte) if !bytes.is_empty() => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Mutation::Flip(..) | Mutation::Set(..) => {}
        Mutation::Insert(at, new) => {
            let at = place(at, bytes);
            bytes.splice(at..at, new.iter().copied());
        }
        Mutation::Word(at, word) if !words.is_empty() => {
            let at = place(at, bytes);
            bytes.splice(at..at, word.get(words).bytes());
        }
        Mutation::Word(..) => {}
        Mutation::Remove(at, count) => {
            let from = place(at, bytes);
            let to = bytes.len().min(from + count);
            bytes.drain(from..to);
        }
        Mutation::Truncate(at) => bytes.truncate(place(at, bytes)),
        Mutation::Splice(at, of, from) => {
            bytes.truncate(place(at, bytes));
            let other = &of.get(corpus).bytes;
            bytes.extend(&other[place(from, other)..]);
        }
        Mutation::Repeat(from, to) => {
            let (from, to) = (place(from, bytes), place(to, bytes));
            let part = bytes[from.min(to)..from.max(to)].to_vec();
            bytes.extend(part);
        }
    }
}

/// An entry of the corpus after a few mutations.
fn input(corpus: Vec<Entry>, words: &'static [&'static str]) -> impl Strategy<Value = Vec<u8>> {
    let start = any::<prop::sample::Index>();
    (start, prop::collection::vec(mutation(), 1..6)).prop_map(move |(start, mutations)| {
        let mut bytes = start.get(&corpus).bytes.clone();
        for mutation in &mutations {
            apply(mutation, &mut bytes, &corpus, words);
        }
        bytes
    })
}

/// What came of feeding a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Fed {
    inputs: u32,
    accepted: u32,
    /// Of all inputs in their order.
    hash: u64,
}

/// Feeds a target with mutations of a corpus.
fn run(target: &Target, corpus: Vec<Entry>) -> Result<Fed, String> {
    let default = Config::default();
    let cases = default.cases.saturating_mul(INPUTS_PER_CASE);
    let config = Config {
        cases,
        rng_seed: RngSeed::Fixed(cases.into()),
        failure_persistence: None,
        ..default
    };
    let fed = Cell::new(Fed::default());
    TestRunner::new(config)
        .run(&input(corpus, target.words), |bytes| {
            // Kept from proptest, which would print the bytes as a list of numbers only.
            match catch_unwind(|| (target.run)(&bytes)) {
                Ok(yes) => fed.update(|fed| Fed {
                    inputs: fed.inputs + 1,
                    accepted: fed.accepted + u32::from(yes),
                    hash: fed.hash.rotate_left(1) ^ stable_hash(&bytes),
                }),
                Err(_) => {
                    let shown = bytes.escape_ascii();
                    return Err(TestCaseError::fail(format!(
                        "{} on b\"{shown}\"",
                        target.name
                    )));
                }
            }
            Ok(())
        })
        .map_err(|error| error.to_string())?;
    Ok(fed.get())
}

fn corpus(target: &Target) -> Vec<Entry> {
    corpus::of(target).expect("the corpus can be read")
}

/// Runs a target on its corpus and on mutations of it.
fn fuzz(name: &str) {
    let target = target(name).expect("a target");
    let corpus = corpus(target);
    for entry in &corpus {
        let accepted = (target.run)(&entry.bytes);
        if let Some(expected) = entry.accepted() {
            assert_eq!(accepted, expected, "{name}: {}", entry.name);
        }
    }
    let fed = run(target, corpus).unwrap_or_else(|error| panic!("{error}"));
    let Fed {
        inputs, accepted, ..
    } = fed;
    // A mutation that is always refused would test nothing but the refusal.
    assert!(
        accepted > inputs / 100,
        "{name}: {accepted} of {inputs} accepted"
    );
    assert!(accepted < inputs, "{name}: nothing is refused");
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                fuzz(stringify!($name));
            }
        )*

        #[test]
        fn every_target_has_a_test_a_corpus_and_a_binary() {
            let tested = [$(stringify!($name)),*];
            let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, tested);
            let of = |folder: &str, ending: &str| -> BTreeSet<String> {
                fs::read_dir(corpus::folder().join("..").join(folder))
                    .expect("a folder")
                    .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
                    .map(|name| name.strip_suffix(ending).unwrap_or(&name).to_owned())
                    .collect()
            };
            let names: BTreeSet<_> = names.into_iter().map(str::to_owned).collect();
            assert_eq!(of("corpus", ""), names);
            assert_eq!(of("fuzz_targets", ".rs"), names);
        }
    };
}

tests! {
    backend_data
    datagrams
    ethtool
    lease_json
    lease_key
    lease_value
    netlink
    netlink_answer
    netlink_message
    network_config
    peer
    tun_packet
}

#[test]
fn the_corpus_has_every_seed() {
    for (name, seed) in seeds::all() {
        let corpus = corpus(target(name).expect("a target"));
        assert!(
            corpus.contains(&seed),
            "{name}/{} is not as the seeds make it: `cargo run -p flannel-fuzz`",
            seed.name
        );
    }
}

/// The corpora are small, so that they can be committed and every entry be mutated.
#[test]
fn the_corpora_are_small() {
    for target in TARGETS {
        let corpus = corpus(target);
        assert!(
            corpus.len() >= 8,
            "{}: {} entries",
            target.name,
            corpus.len()
        );
        for entry in corpus {
            let len = entry.bytes.len();
            assert!(len <= 8192, "{}/{}: {len} bytes", target.name, entry.name);
        }
    }
}

/// A rule broken deep inside is found from a corpus that keeps it.
#[test]
fn a_planted_panic_is_found() {
    fn planted(bytes: &[u8]) -> bool {
        let data = flannel_core::BackendData::from_json(&String::from_utf8_lossy(bytes));
        let vxlan = data.and_then(|data| flannel_backend_vxlan::VxlanData::decode(&data));
        assert!(
            vxlan.is_err() || bytes.starts_with(b"{\"VNI\":1,"),
            "planted"
        );
        vxlan.is_ok()
    }
    let words = target("backend_data").expect("a target").words;
    let target = Target {
        name: "planted",
        run: planted,
        words,
    };
    let kept = Entry {
        name: "ok-vxlan".to_owned(),
        bytes: br#"{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}"#.to_vec(),
    };
    assert!(planted(&kept.bytes));
    let found = run(&target, vec![kept]).expect_err("it was planted");
    assert!(found.contains("planted on b\"{"), "{found}");
}

/// One seed, one sequence of inputs.
#[test]
fn the_same_inputs_are_made_every_time() {
    let lease_key = target("lease_key").expect("a target");
    let once = || run(lease_key, corpus(lease_key));
    assert_eq!(once(), once());
}
