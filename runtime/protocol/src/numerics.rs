//! How two numerics classes differ. A class is what decides the last bits besides the job, as `name=value` by `; `.

use std::collections::{BTreeMap, BTreeSet};

/// Letters of a value that people are shown.
const SHORT: usize = 80;

/// What is otherwise in `found` than in `expected`, for people. Classes that name nothing, as those of earlier releases,
/// are shown as they are.
pub fn difference(found: &str, expected: &str) -> String {
    let (ours, theirs) = (parts(found), parts(expected));
    let names: BTreeSet<&str> = ours.keys().chain(theirs.keys()).copied().collect();
    let said = |name: &str| {
        let [found, expected] = [&ours, &theirs].map(|parts| short(parts.get(name).unwrap_or(&"nothing")));
        (found != expected).then(|| format!("{name} is {found} instead of {expected}"))
    };
    let differences: Vec<String> = names.into_iter().filter_map(said).collect();
    match differences.is_empty() {
        true => format!("it is {} instead of {}", short(found), short(expected)),
        false => differences.join(", "),
    }
}

/// Whether what both classes call `name` is not the same.
pub fn differs_in(name: &str, found: &str, expected: &str) -> bool {
    parts(found).get(name) != parts(expected).get(name)
}

fn parts(class: &str) -> BTreeMap<&str, &str> {
    class.split("; ").filter_map(|part| part.split_once('=')).collect()
}

fn short(value: &str) -> String {
    match value.char_indices().nth(SHORT) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_said() {
        let told = difference("program=a; isa=avx2; threads=1", "program=a; isa=avx512f; threads=1");
        assert_eq!(told, "isa is avx2 instead of avx512f");
        let told = difference("isa=avx2; driver=1", "isa=avx512f");
        assert_eq!(told, "driver is 1 instead of nothing, isa is avx2 instead of avx512f");
        let differs = |name: &str| differs_in(name, "program=a; isa=avx2", "program=b; isa=avx2");
        assert!(differs("program") && !differs("isa") && !differs("driver"));
    }

    #[test]
    fn classes_without_names_are_shown_in_short() {
        assert_eq!(difference("avx2", "avx512"), "it is avx2 instead of avx512");
        assert!(difference(&"ä".repeat(200), "x").chars().count() < 120);
    }
}
