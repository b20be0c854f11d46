//! The difference of two values, field by field, for whoever reads why a promise is broken.

use std::fmt::{self, Debug};

/// The most differences that are told; more say nothing more.
const MOST: usize = 12;

/// Where two values differ: a line for each field, with what is there and what should be.
///
/// Both are read as `{:#?}` shows them, so every type has it, private fields are told too, and what
/// a type hides from its `Debug` stays hidden.
pub(crate) fn difference<T: Debug + ?Sized>(found: &T, wanted: &T) -> String {
    let differences = differences(found, wanted);
    let told = differences.iter().take(MOST);
    let mut text: String = told.map(|difference| format!("\n  {difference}")).collect();
    if let Some(more @ 1..) = differences.len().checked_sub(MOST) {
        text.push_str(&format!("\n  and {more} more"));
    }
    text
}

/// One field in which two values differ.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The way to the field: `subnet.v4`; empty for the values themselves.
    pub(crate) field: String,
    /// The value that is there; `None` where it has no such part.
    pub(crate) found: Option<String>,
    /// The value that should be there.
    pub(crate) wanted: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        let found = self.found.as_deref().unwrap_or("nothing");
        let wanted = self.wanted.as_deref().unwrap_or("nothing");
        write!(f, "found {found}, wanted {wanted}")
    }
}

/// Every field in which two values differ.
pub(crate) fn differences<T: Debug + ?Sized>(found: &T, wanted: &T) -> Vec<Difference> {
    let mut out = Vec::new();
    let (found, wanted) = (format!("{found:#?}"), format!("{wanted:#?}"));
    compare("", &Tree::read(&found), &Tree::read(&wanted), &mut out);
    if out.is_empty() && found != wanted {
        out.push(Difference {
            field: String::new(),
            found: Some(found),
            wanted: Some(wanted),
        });
    }
    out
}

fn compare(field: &str, found: &Tree, wanted: &Tree, out: &mut Vec<Difference>) {
    if found == wanted {
        return;
    }
    if found.head != wanted.head || found.parts.is_empty() || wanted.parts.is_empty() {
        out.push(Difference {
            field: field.to_owned(),
            found: Some(found.line()),
            wanted: Some(wanted.line()),
        });
        return;
    }
    // Parts with names are fields or entries, others the elements of a list.
    let named = found.parts.iter().chain(&wanted.parts);
    if named.clone().all(|(name, _)| name.is_some()) {
        by_name(field, found, wanted, out);
    } else if found.parts.len() == wanted.parts.len() {
        let alone = found.parts.len() == 1;
        let pairs = found.parts.iter().zip(&wanted.parts).enumerate();
        for (n, ((_, found), (_, wanted))) in pairs {
            let field = match alone {
                true => field.to_owned(),
                false => format!("{field}[{n}]"),
            };
            compare(&field, found, wanted, out);
        }
    } else {
        by_presence(field, found, wanted, out);
    }
}

fn by_name(field: &str, found: &Tree, wanted: &Tree, out: &mut Vec<Difference>) {
    let within = |name: &Option<String>| {
        let name = name.as_deref().unwrap_or_default();
        match field {
            "" => name.to_owned(),
            _ => format!("{field}.{name}"),
        }
    };
    for (name, part) in &found.parts {
        match wanted.part(name) {
            Some(other) => compare(&within(name), part, other, out),
            None => out.push(Difference {
                field: within(name),
                found: Some(part.line()),
                wanted: None,
            }),
        }
    }
    let missing = wanted.parts.iter();
    for (name, part) in missing.filter(|(name, _)| found.part(name).is_none()) {
        out.push(Difference {
            field: within(name),
            found: None,
            wanted: Some(part.line()),
        });
    }
}

/// Lists of two lengths: what only one of them has.
fn by_presence(field: &str, found: &Tree, wanted: &Tree, out: &mut Vec<Difference>) {
    let only = |these: &Tree, those: &Tree| {
        let mut rest: Vec<&Tree> = those.parts.iter().map(|(_, part)| part).collect();
        let mut only = Vec::new();
        for (_, part) in &these.parts {
            match rest.iter().position(|other| *other == part) {
                Some(n) => drop(rest.remove(n)),
                None => only.push(part.line()),
            }
        }
        only
    };
    let told = |found, wanted| Difference {
        field: field.to_owned(),
        found,
        wanted,
    };
    out.extend(
        only(found, wanted)
            .into_iter()
            .map(|part| told(Some(part), None)),
    );
    out.extend(
        only(wanted, found)
            .into_iter()
            .map(|part| told(None, Some(part))),
    );
}

/// A value as `{:#?}` shows it: `Lease {`, its fields, and `}`; or one line without parts.
#[derive(Debug, PartialEq, Eq, Default)]
struct Tree {
    head: String,
    parts: Vec<(Option<String>, Self)>,
    tail: String,
}

impl Tree {
    fn read(text: &str) -> Self {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        Self::rest(first.trim_end_matches(','), &mut lines)
    }

    /// The thing that a line begins, and its parts from the lines that follow.
    fn rest(head: &str, lines: &mut std::str::Lines<'_>) -> Self {
        let mut tree = Self {
            head: head.to_owned(),
            ..Self::default()
        };
        if !head.ends_with(['{', '(', '[']) {
            return tree;
        }
        while let Some(line) = lines.next() {
            let line = line.trim();
            let line = line.strip_suffix(',').unwrap_or(line);
            if line.starts_with(['}', ')', ']']) {
                tree.tail = line.to_owned();
                break;
            }
            let (name, head) = match line.split_once(": ") {
                // A text may have a colon in it.
                Some((name, head)) if !line.starts_with('"') || name.ends_with('"') => {
                    (Some(name.to_owned()), head)
                }
                _ => (None, line),
            };
            let mut part = (name, Self::rest(head, lines));
            // The key of an entry may have lines of its own, and its value begins where it ends.
            if let Some((end, value)) = part.1.tail.clone().split_once(": ") {
                part.1.tail = end.to_owned();
                part = (Some(part.1.line()), Self::rest(value, lines));
            }
            tree.parts.push(part);
        }
        tree
    }

    fn part(&self, name: &Option<String>) -> Option<&Self> {
        let mut parts = self.parts.iter();
        let found = parts.find(|(other, _)| other == name);
        found.map(|(_, part)| part)
    }

    /// The value on one line, as `{:?}` has it.
    fn line(&self) -> String {
        let parts = self.parts.iter().map(|(name, part)| match name {
            Some(name) => format!("{name}: {}", part.line()),
            None => part.line(),
        });
        let parts: Vec<String> = parts.collect();
        let space = if self.head.ends_with('{') && !parts.is_empty() {
            " "
        } else {
            ""
        };
        let parts = parts.join(", ");
        format!("{}{space}{parts}{space}{}", self.head, self.tail)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Clone, Default)]
    #[allow(dead_code, reason = "they are shown")]
    struct Outer {
        name: &'static str,
        inner: Option<Inner>,
        list: Vec<u8>,
        map: BTreeMap<(u8, u8), &'static str>,
    }

    #[derive(Debug, Clone)]
    #[allow(dead_code, reason = "they are shown")]
    struct Inner {
        a: u8,
        b: (u8, u8),
    }

    fn outer() -> Outer {
        Outer {
            name: "a: {",
            inner: Some(Inner { a: 1, b: (2, 3) }),
            list: vec![1, 2],
            map: BTreeMap::from([((1, 2), "x"), ((3, 4), "y")]),
        }
    }

    fn told(change: impl Fn(&mut Outer)) -> Vec<String> {
        let mut found = outer();
        change(&mut found);
        let differences = differences(&found, &outer());
        differences.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_field_that_differs_is_told_and_no_other() {
        assert_eq!(told(|_| ()), Vec::<String>::new());
        let name = told(|outer| outer.name = "b");
        assert_eq!(name, [r#"name: found "b", wanted "a: {""#]);
        let inner = told(|outer| outer.inner = Some(Inner { a: 7, b: (2, 9) }));
        let lines = [
            "inner.a: found 7, wanted 1",
            "inner.b[1]: found 9, wanted 3",
        ];
        assert_eq!(inner, lines);
        let none = told(|outer| outer.inner = None);
        let whole = "inner: found None, wanted Some(Inner { a: 1, b: (2, 3) })";
        assert_eq!(none, [whole]);
    }

    #[test]
    fn lists_and_maps_tell_what_only_one_of_them_has() {
        let longer = told(|outer| outer.list = vec![9, 1, 2]);
        assert_eq!(longer, ["list: found 9, wanted nothing"]);
        let shorter = told(|outer| outer.list = vec![2]);
        assert_eq!(shorter, ["list: found nothing, wanted 1"]);
        let other = told(|outer| outer.list = vec![1, 3]);
        assert_eq!(other, ["list[1]: found 3, wanted 2"]);
        let map = told(|outer| {
            outer.map.remove(&(1, 2));
            outer.map.insert((3, 4), "z");
        });
        let lines = [
            r#"map.(3, 4): found "z", wanted "y""#,
            r#"map.(1, 2): found nothing, wanted "x""#,
        ];
        assert_eq!(map, lines);
    }

    #[test]
    fn a_hundred_differences_are_not_all_told() {
        let text = difference(&[0; 100], &[1; 100]);
        assert_eq!(text.lines().count(), MOST + 2);
        assert!(text.ends_with("and 88 more"), "{text}");
    }
}
