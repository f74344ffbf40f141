//! Names of tools, agents, sessions and argument keys, made comparable.
//!
//! [`normalise`]: NFKC (full-width and other compatibility letters become plain ones), default-ignorable characters
//! (zero-width, soft hyphen, direction marks, variation selectors, tags) removed, white space trimmed, lower case.
//! [`skeleton`]: UTS #39, so that letters of other scripts that look alike become equal; it covers what the Unicode
//! confusables table lists and nothing else (`rn` and `m` are in it, a lower-case L and a one as well).

use unicode_normalization::UnicodeNormalization;

/// Characters that are not shown: the `Default_Ignorable_Code_Point` ranges a name could hide in.
pub fn is_ignorable(c: char) -> bool {
    matches!(c,
        '\u{00AD}' | '\u{034F}' | '\u{061C}' | '\u{115F}' | '\u{1160}' | '\u{17B4}' | '\u{17B5}'
        | '\u{180B}'..='\u{180F}' | '\u{200B}'..='\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{206F}'
        | '\u{3164}' | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}' | '\u{FFA0}' | '\u{FFF0}'..='\u{FFF8}'
        | '\u{1BCA0}'..='\u{1BCA3}' | '\u{1D173}'..='\u{1D17A}' | '\u{E0000}'..='\u{E0FFF}')
}

/// NFKC without ignorable characters; case is kept.
pub fn plain(text: &str) -> String {
    text.nfkc().filter(|&c| !is_ignorable(c)).collect()
}

/// The form in which names are compared.
///
/// ```
/// assert_eq!(tool_rules::names::normalise(" Ｒead\u{200b}_File"), "read_file");
/// ```
pub fn normalise(name: &str) -> String {
    if name.is_ascii() {
        return name.trim().to_ascii_lowercase();
    }
    plain(name).trim().to_lowercase()
}

/// The UTS #39 skeleton of the normalised name.
pub fn skeleton(name: &str) -> String {
    unicode_security::confusable_detection::skeleton(&normalise(name)).collect()
}

/// `text` with letters that look like ASCII ones replaced by them; ASCII itself is left alone.
pub fn fold_lookalikes(text: &str) -> String {
    let mut folded = String::with_capacity(text.len());
    let mut buffer = [0u8; 4];
    for c in text.chars() {
        if c.is_ascii() {
            folded.push(c);
            continue;
        }
        let start = folded.len();
        folded.extend(unicode_security::confusable_detection::skeleton(c.encode_utf8(&mut buffer)));
        if !folded[start..].is_ascii() {
            folded.truncate(start);
            folded.push(c);
        }
    }
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lookalikes_share_a_skeleton() {
        assert_eq!(skeleton("dеlete_filе"), skeleton("delete_file"));
        assert_ne!(normalise("dеlete_filе"), normalise("delete_file"));
        assert_eq!(fold_lookalikes("/еtc/pаsswd"), "/etc/passwd");
    }

    #[test]
    fn hidden_characters_and_width_do_not_make_another_name() {
        for name in ["Read_File", "ｒｅａｄ＿ｆｉｌｅ", "read\u{200d}_file\u{feff}", "re\u{00ad}ad_file"] {
            assert_eq!(normalise(name), "read_file", "{name:?}");
        }
    }
}
