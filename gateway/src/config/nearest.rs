//! What was probably meant.

/// Adds the nearest known key to a complaint about an unknown one.
pub(super) fn suggest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = message.starts_with("unknown field") || message.starts_with("unknown variant");
    let (true, Some(wrong)) = (unknown, quoted.next()) else {
        return message.to_owned();
    };
    let best = quoted
        .map(|known| (distance(wrong, known), known))
        .min_by_key(|(d, _)| *d)
        // Further away than this is another word, not a slip.
        .filter(|(d, _)| *d <= wrong.len().div_ceil(2));
    match best {
        Some((_, known)) => format!("{message}; did you mean `{known}`?"),
        None => message.to_owned(),
    }
}

/// Letters to insert, remove or change to get from one to the other.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        assert_eq!(distance("listner", "listener"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("same", "same"), 0);
    }

    #[test]
    fn a_slip_is_put_right_and_another_word_is_not() {
        let complaint =
            |wrong| format!("unknown field `{wrong}`, expected one of `names`, `listener`");
        assert!(suggest(&complaint("listner")).ends_with("did you mean `listener`?"));
        assert_eq!(suggest(&complaint("zzzz")), complaint("zzzz"));
        assert_eq!(suggest("invalid type: `x`"), "invalid type: `x`");
    }
}
