//! THREAT-MODEL.md names the test of each case: that is true.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on says where by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Every file of ours in Rust, by its path from the top.
fn sources(below: &Path, top: &Path, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(below).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') && name != "target" && name != "node_modules" {
            sources(&path, top, found);
        } else if name.ends_with(".rs") {
            let short = path.strip_prefix(top).unwrap().display().to_string();
            found.insert(short, fs::read_to_string(&path).unwrap());
        }
    }
}

/// `AUT-01 to AUT-03, AUT-09` has four.
fn cases(cell: &str) -> Vec<String> {
    let mut all = Vec::new();
    for part in cell.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once(" to ").unwrap_or((part, part));
        let (family, from) = first.split_once('-').expect(part);
        let (_, to) = last.split_once('-').expect(part);
        for n in from.parse::<u32>().unwrap()..=to.parse().unwrap() {
            all.push(format!("{}_{n:02}_", family.to_lowercase()));
        }
    }
    all
}

#[test]
fn every_case_is_a_test_in_a_file_that_its_row_names() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = BTreeMap::new();
    sources(top, top, &mut files);
    let text = fs::read_to_string(top.join("THREAT-MODEL.md")).unwrap();
    let mut looked_at = 0;
    for row in text.lines().filter(|l| l.starts_with("| ")) {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let [_, ids, _, named, _] = cells[..] else {
            continue;
        };
        if !ids.starts_with(|c: char| c.is_ascii_uppercase()) {
            continue;
        }
        // A file, or a directory of one test program.
        let named: Vec<_> = named.split('`').skip(1).step_by(2).collect();
        for name in &named {
            let there = files.keys().any(|f| f.contains(name));
            assert!(there, "{ids}: there is no {name}");
        }
        for case in cases(ids) {
            looked_at += 1;
            let of_it = |f: &str| named.iter().any(|n| f.contains(n));
            let there = files.iter().any(|(f, text)| {
                let mut tests = text.split("fn ").skip(1);
                of_it(f) && tests.any(|t| t.split('(').next().unwrap_or("").contains(&case))
            });
            assert!(there, "no test of {case} in {named:?}");
        }
    }
    assert!(looked_at > 100, "only {looked_at} cases");
}
