//! llama.cpp's grammar format: the texts of a grammar, from the token masks for a model, against a simple definition.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use lapidary::sample::Constraint;
use lapidary::serve::{Form, FormError, Grammars, Limited, gbnf};
use lapidary::text::Tokenizer;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::client::Server;
use crate::models::{TEMPLATE, tokenizer_files};

/// A vocabulary of all bytes, and some tokens of several.
struct Model {
    grammars: Grammars,
    tokens: Vec<Vec<u8>>,
}

const END: u32 = 2;
/// No token of a text.
const START: u32 = 1;
const MORE: [&str; 14] = [
    "ab", "aa", "ba", "abc", "bca", "tr", "true", "ue", "\": ", "\",", "}}", "  ", " \n", "é\"",
];

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let files = tokenizer_files(folder.path(), TEMPLATE);
        let path = files.join("tokenizer.json");
        let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        // How byte-level tokenizers write bytes: printable ones unchanged, the others from U+0100 on.
        let seen = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let mut others = 256..;
        let letters: Vec<char> = (0u32..256)
            .map(|byte| match seen(byte) {
                true => char::from_u32(byte).unwrap(),
                false => char::from_u32(others.next().unwrap()).unwrap(),
            })
            .collect();
        let written = |bytes: &[u8]| bytes.iter().map(|byte| letters[usize::from(*byte)]).collect::<String>();
        let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(String::from);
        let single = (0..=255u8).map(|byte| written(&[byte]));
        let more = MORE.iter().map(|text| written(text.as_bytes()));
        let all = special.into_iter().chain(single).chain(more);
        let vocabulary: serde_json::Map<String, Value> =
            all.enumerate().map(|(id, token)| (token, json!(id))).collect();
        let count = vocabulary.len();
        tokenizer["model"]["vocab"] = Value::Object(vocabulary);
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let tokenizer = Tokenizer::open(&files).unwrap();
        let tokens = tokenizer.token_bytes().to_vec();
        assert_eq!(tokens.len(), count);
        assert_eq!(tokens[3 + 0x41], b"A");
        Model {
            grammars: Grammars::new(&tokenizer, count, &BTreeSet::from([END])).unwrap(),
            tokens,
        }
    })
}

fn follow(grammar: &str) -> Limited {
    let followed = model().grammars.follow(Form::grammar(grammar.to_string()));
    followed.unwrap_or_else(|error| panic!("{error}\n{grammar}\n{}", gbnf::to_lark(grammar).unwrap_or_default()))
}

fn allowed(limited: &mut Limited) -> Vec<bool> {
    let mut logits = vec![0.0; model().tokens.len()];
    limited.limit(&mut logits).unwrap();
    logits.iter().map(|logit| *logit == 0.0).collect()
}

/// Whether a grammar accepts a text, tokenized here as single bytes or as longest tokens.
fn has(start: &Limited, text: &str, longest: bool) -> bool {
    let mut limited = start.again();
    let mut rest = text.as_bytes();
    let mut is_complete = false;
    while !rest.is_empty() {
        let tokens = model().tokens.iter().enumerate().skip(3);
        let fitting = tokens.filter(|(_, token)| rest.starts_with(token) && (longest || token.len() == 1));
        let (id, token) = fitting.max_by_key(|(_, token)| token.len()).unwrap();
        if is_complete || !allowed(&mut limited)[id] {
            return false;
        }
        is_complete = limited.accept(id as u32).unwrap();
        rest = &rest[token.len()..];
    }
    is_complete || allowed(&mut limited)[END as usize]
}

fn check(grammar: &str, texts: &[&str], others: &[&str]) {
    let start = follow(grammar);
    for longest in [false, true] {
        for text in texts {
            assert!(
                has(&start, text, longest),
                "{text:?} is of {grammar}\n{}",
                gbnf::to_lark(grammar).unwrap()
            );
        }
        for text in others {
            assert!(
                !has(&start, text, longest),
                "{text:?} is not of {grammar}\n{}",
                gbnf::to_lark(grammar).unwrap()
            );
        }
    }
}

const JSON: &str = r#"# JSON, with white space where it may be
root    ::= object
value   ::= object | array | string | number | ("true" | "false" | "null") ws
object  ::= "{" ws (member ("," ws member)*)? "}" ws
member  ::= string ":" ws value
array   ::= "[" ws (
    value # the first
    ("," ws value)*
  )? "]" ws
string  ::= "\"" ([^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number  ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws      ::= ([ \t\n] ws)?
"#;

#[test]
fn json() {
    check(
        JSON,
        &[
            "{}",
            "{ \n}",
            r#"{"a": 1}"#,
            r#"{"a":-0.5e+10,"b" : [true,false , null],"c":{"d":[]}} "#,
            "{\"é\": \"\\u00e9\\\"\u{1F600}\", \"\": [[[[]]], {\"x\": \"true\"}]}\n",
            r#"{"true": true, "a": [1, 2.25, -3]}"#,
        ],
        &[
            "",
            "{",
            "[]",
            "{}}",
            r#"{"a": 01}"#,
            r#"{"a": 1,}"#,
            r#"{"a" 1}"#,
            r#"{"a": "\x"}"#,
            r#"{"a": "\u12"}"#,
            "{\"a\": \"\n\"}",
            r#"{"a": tru}"#,
            r#"{'a': 1}"#,
        ],
    );
    // Terminals are long: a string of JSON is one. Character by character a step would be a hundred times as long.
    let lark = gbnf::to_lark(JSON).unwrap();
    assert!(lark.lines().filter(|line| line.starts_with('r')).count() <= 4, "{lark}");
}

#[test]
fn arithmetic_whose_white_space_ends_lines_too() {
    // `ws` contains the line end that follows it, so a lexer of long terminals would consume it too early.
    check(
        r#"
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"#,
        &[
            "a=1\n",
            "a +b1 *(3 -x_2) = 12\n",
            "1=1\n2=2\n",
            "((a))\n=\n\nb \n\n",
            "1+1=2 \n\n1=1\n",
        ],
        &["", "a=1", "a=\n", "(a=1\n", "a=1\n2", "a==1\n", "=1\n", "A=1\n"],
    );
}

#[test]
fn regular_grammars() {
    check(
        r#"root ::= item+
item ::= "- " [^\r\n\x0b]+ "\n""#,
        &["- a\n", "- eggs, milk\n- [x]\n- - -\n", "- héllo\n"],
        &["", "-a\n", "- \n", "- a", "- a\n\n", "- a\r\n"],
    );
    let chess = r#"# A game in algebraic notation
root   ::= turn{1,300}
turn   ::= [1-9] [0-9]{0,2} ". " move " " (move | result) "\n"
move   ::= (pawn | piece | castle) [+#]?
piece  ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn   ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBQR])?
castle ::= "O-O" "-O"?
result ::= "1-0" | "0-1" | "1/2-1/2""#;
    check(
        chess,
        &[
            "1. e4 e5\n",
            "1. e4 e5\n2. Nf3 Nc6\n3. O-O-O Qxf7#\n",
            "12. exd8=Q+ 1/2-1/2\n",
            "3. Nbd2 R1e2\n",
        ],
        &[
            "1. e4\n",
            "1. e9 e5\n",
            "0. e4 e5\n",
            "1. e4 e5",
            "1. O-O-O-O e5\n",
            "1. Px4 e5\n",
        ],
    );
    check(
        "root ::= (\"a\" | \"ab\") (\"c\" | \"bcd\") # overlapping\n",
        &["ac", "abc", "abcd", "abbcd"],
        &["ab", "acd", "a", "abcdd"],
    );
    check("root ::= \"\"", &[""], &["a", " "]);
    check(
        "root ::= [a-c]{2,3} [^a-c]{2} .{0,1}",
        &["ab  ", "abc\u{e9}\u{e9}", "aaxx\n"],
        &["axx", "abcaxx", "aaxxyy"],
    );
    check(
        "root ::= [\\x61\\u0062\\U00000063\\]\\[\\\\^-]+",
        &["abc", "][\\^-"],
        &["d", "\"", "ab "],
    );
    check(
        "root ::= [α-ω]+ [א-ת] \"é\\u00e9\" [😀-😂]",
        &["αωבéé😁"],
        &["aבéé😁", "αωבé😁", "ϊבéé😁", "αωבéé😃"],
    );
    // Both classes begin with the same byte of UTF-8: a byte lexer has entered the second one before it can tell.
    check(
        "root ::= x\nx ::= [α-γ]+ [δ-ζ] x? [η]",
        &["αδη", "αβγεαδηη"],
        &["αη", "αδ", "δη", "αδαδη"],
    );
    check("root ::= w\nw ::= ([ab] w)? # the end", &["", "abab"], &["c", "abc"]);
    check(
        "root ::= n\nn ::= n [0-9] | \"-\" | \"+\" | n \"_\"",
        &["-", "+1_2", "-__"],
        &["1", "", "--"],
    );
    check(
        "root ::= ((\"a\"?)*)+ (\"\" | \"b\")* \"c\"?",
        &["", "aab", "abc", "c"],
        &["ca", "ba"],
    );
}

#[test]
fn recursive_grammars() {
    let mirrored = "root ::= \"a\" root \"a\" | \"b\" root \"b\" | [abc]?";
    check(mirrored, &["", "a", "aba", "abcba", "aabbaa"], &["ab", "abca", "aab"]);
    // A name may be a word of the language, and a word may begin a name.
    let words = r#"root ::= "let" name? "in" root "end" | name
name ::= [a-z]+"#;
    check(
        words,
        &["let", "letxinyend", "inend", "letinletend", "letinletainbendend"],
        &["", "let in", "letX"],
    );
    check(
        "root ::= s\ns ::= s s | \"(\" s \")\" | \"()\"",
        &["()", "()()", "(()())", "((()))()"],
        &["", "(", "())", ")("],
    );
    check(
        "root ::= (\"(\" root \")\"){2,3} | \"a\"{2} | b{0} \"c\"\nb ::= root",
        &["aa", "c", "(aa)(c)", "((aa)(aa))(aa)(c)"],
        &["a", "(aa)", "(c)(c)(c)(c)", "aaa"],
    );
    check(
        "root ::= a\na ::= b \"1\" | \"x\"\nb ::= a \"2\" | \"y\"",
        &["x", "y1", "x21"],
        &["y", "x2", "x1", "1"],
    );
    // Names as Lark's words, and comments in odd places.
    check(
        "root::=start \"!\"#x\nstart ::= # y\n  Rule-2 |\n  (start # z\n  \",\" Rule-2)\n\nRule-2 ::= [a-z]\n  | \"T1\"",
        &["a!", "a,b,T1!"],
        &["a", "a,!", "T2!"],
    );
}

#[test]
fn tokens_of_the_model() {
    let mut limited = follow("root ::= \"a\" (<|im_start|> \"b\" root | <[0]>) \"c\"");
    let mut step = |id: u32| {
        assert!(allowed(&mut limited)[id as usize], "{id}");
        limited.accept(id).unwrap()
    };
    let letter = |c: u8| 3 + u32::from(c);
    let text = [
        letter(b'a'),
        START,
        letter(b'b'),
        letter(b'a'),
        0,
        letter(b'c'),
        letter(b'c'),
    ];
    let ends: Vec<bool> = text.into_iter().map(&mut step).collect();
    assert_eq!(ends, [false, false, false, false, false, false, true]);
    let mut limited = follow("root ::= \"a\" <|im_start|> | root \"b\"");
    limited.accept(letter(b'a')).unwrap();
    let mask = allowed(&mut limited);
    assert_eq!(mask.iter().filter(|allowed| **allowed).count(), 1);
}

#[test]
fn grammars_that_cannot_be_read_say_where() {
    for (grammar, message) in [
        ("root ::= \"a", "GBNF, line 1, column 10: this text has no second '\"'"),
        (
            "root ::= a\n\n  b c",
            "GBNF, line 3, column 5: 'c' is here, where ::= follows the name \"b\" of a rule",
        ),
        ("root ::= [a-", "GBNF, line 1, column 10: this class has no ']'"),
        ("root ::= []", "GBNF, line 1, column 10: no character is of this class"),
        (
            "root ::= [z-a]",
            "GBNF, line 1, column 14: 'z' to 'a' is not a range: it goes down",
        ),
        (
            "root ::= (\"a\"\n\"b\"",
            "GBNF, line 1, column 10: this group has no ')'",
        ),
        (
            "root ::= \"a\")",
            "GBNF, line 1, column 13: ')' is here, where a rule goes on or ends",
        ),
        (
            "root ::= (\"a\" ; \"b\")",
            "GBNF, line 1, column 15: ';' is here, where a group goes on or ends with ')'",
        ),
        (
            "root ::= * \"a\"",
            "GBNF, line 1, column 10: '*' is here, and nothing before it that it could repeat",
        ),
        (
            "root ::= \"a\"{2,1}",
            "GBNF, line 1, column 17: {2,1}: the most is less than the least",
        ),
        (
            "root ::= \"a\"{,1}",
            "GBNF, line 1, column 14: ',' is here, where a number of repetitions belongs",
        ),
        (
            "root ::= \"a\"{2001}",
            "GBNF, line 1, column 18: more than 2000 repetitions; use {m,} for any number",
        ),
        (
            "root ::= \"a\"{2",
            "GBNF, line 1, column 15: the end is here, where a repetition ends with '}'",
        ),
        (
            "root ::= \"\\q\"",
            "GBNF, line 1, column 12: 'q' after '\\' is not an escape; those are \\n \\r \\t \\\\ \\\" \\[ \\] \\xHH \\uHHHH \\UHHHHHHHH",
        ),
        (
            "root ::= \"\\u12\"",
            "GBNF, line 1, column 15: '\"' is here, where 4 hexadecimal digits belong",
        ),
        (
            "root ::= \"\\ud800\"",
            "GBNF, line 1, column 17: U+D800 is not a character",
        ),
        (
            "root ::= \"a\" b\r\n# c\r\nd ::= b",
            "GBNF, line 1, column 14: there is no rule \"b\"",
        ),
        (
            "roots ::= \"a\"",
            "GBNF: there is no rule \"root\", which a text begins with",
        ),
        (
            "root ::= \"a\"\nb ::= \"b\"\nroot ::= \"c\"",
            "GBNF, line 3: rule \"root\" is already defined in line 1",
        ),
        (
            "root ::= \"a\" | x\nx ::= \"b\" x",
            "GBNF, line 2: no text of rule \"x\" has an end, since each of its alternatives leads back to it",
        ),
        (
            "root ::= !<[3]>",
            "GBNF, line 1, column 10: \"any token but\" (!<…>) is not supported; use a class of characters, [^…]",
        ),
        (
            "root ::= <[x]>",
            "GBNF, line 1, column 10: \"<[x]>\" is not a token: write <name> or <[id]>",
        ),
        (
            "::= \"a\"",
            "GBNF, line 1, column 1: ':' is here, where a rule begins (name ::= …)",
        ),
    ] {
        match model().grammars.follow(Form::grammar(grammar.to_string())) {
            Err(error @ FormError::Gbnf(_)) => assert_eq!(error.to_string(), message, "{grammar}"),
            other => panic!("{grammar}: {:?}", other.err()),
        }
    }
    let unknown = model()
        .grammars
        .follow(Form::grammar("root ::= <|nothing|>".to_string()));
    assert!(matches!(unknown.err(), Some(FormError::Refused(why)) if why.contains("<|nothing|>")));
    // Lark grammars may contain the sign of a rule.
    assert!(gbnf::is_gbnf("# Lark?\n\n  a-b \t::= c") && !gbnf::is_gbnf("start: /a-z/ \"::=\"") && !gbnf::is_gbnf(""));
}

#[test]
fn large_grammars_end_soon() {
    let refused = |text: String| model().grammars.follow(Form::grammar(text)).err();
    let deep: String = (0..3000).map(|i| format!("{i}::={}\n", i + 1)).collect();
    assert_eq!(refused(format!("root::=0\n{deep}3000::=\"a\"|\"(\"root\")\"")), None);
    assert_eq!(refused(format!("root::=0\n{deep}3000::=\"a\"")), None);
    // Each rule is twice the previous one: expanded, it would be enormous.
    let doubled: String = (0..40).map(|i| format!("r{i} ::= r{n} r{n}\n", n = i + 1)).collect();
    let doubled = refused(format!("root ::= \"(\" root? \")\" r0\n{doubled}r40 ::= \"a\"?"));
    assert!(matches!(doubled, None | Some(FormError::Refused(_))), "{doubled:?}");
    let repeated = refused("root ::= (((\"a\" | root){2000}){2000}){2000}".to_string());
    assert!(matches!(repeated, None | Some(FormError::Refused(_))), "{repeated:?}");
    assert_eq!(
        refused("root ::= \"(\" root? \")\" [a-z]{0,900} [a-y]{0,900}".to_string()),
        None
    );
    let groups = format!("root ::= {}\"a\"{}", "(".repeat(5000), ")".repeat(5000));
    assert!(
        refused(groups)
            .unwrap()
            .to_string()
            .contains("more than 100 groups in each other")
    );
    let long = format!("root ::= \"{}\"", "a".repeat(gbnf::LONGEST));
    assert!(matches!(refused(long), Some(FormError::TooLong(_))));
    let lark: String = (0..10000).map(|i| format!("r{i}:r{}\n", i + 1)).collect();
    assert_eq!(refused(format!("start:r0\n{lark}r10000:\"a\"")), None);
}

/// Grammars of a few rules, as text and as data.
#[derive(Clone, Debug)]
enum Part {
    Text(String),
    Class(bool, BTreeSet<char>),
    Rule(usize),
    Seq(Vec<Part>),
    Any(Vec<Part>),
    Repeat(Box<Part>, u32, Option<u32>),
}

const LETTERS: [char; 3] = ['a', 'b', 'c'];
const RULES: usize = 4;

fn parts() -> impl Strategy<Value = Part> {
    let letter = prop::sample::select(&LETTERS[..]);
    let leaf = prop_oneof![
        4 => "[abc]{0,3}".prop_map(Part::Text),
        2 => (any::<bool>(), prop::collection::btree_set(letter, 1..3)).prop_map(|(not, set)| Part::Class(not, set)),
        3 => (0..RULES).prop_map(Part::Rule),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            3 => prop::collection::vec(inner.clone(), 1..4).prop_map(Part::Seq),
            2 => prop::collection::vec(inner.clone(), 2..4).prop_map(Part::Any),
            2 => (inner, 0..3u32, prop::option::of(0..3u32))
                .prop_map(|(part, least, more)| Part::Repeat(Box::new(part), least, more.map(|more| least + more))),
        ]
    })
}

fn written(part: &Part) -> String {
    match part {
        Part::Text(text) => format!("{text:?}"),
        Part::Class(not, set) => {
            let set: String = set.iter().collect();
            format!("[{}{set}]", if *not { "^" } else { "" })
        }
        Part::Rule(index) => name(*index),
        Part::Seq(parts) => format!("({})", parts.iter().map(written).collect::<Vec<_>>().join(" ")),
        Part::Any(parts) => format!("({})", parts.iter().map(written).collect::<Vec<_>>().join(" |\n ")),
        Part::Repeat(part, least, most) => match (least, most) {
            (0, None) => format!("{}*", written(part)),
            (1, None) => format!("{}+", written(part)),
            (0, Some(1)) => format!("{}?", written(part)),
            (least, None) => format!("{}{{{least},}}", written(part)),
            (least, Some(most)) if least == most => format!("{}{{{least}}}", written(part)),
            (least, Some(most)) => format!("{}{{{least}, {most}}}", written(part)),
        },
    }
}

fn name(index: usize) -> String {
    match index {
        0 => "root".to_string(),
        index => format!("r-{index}"),
    }
}

/// The end positions of a part's matches that begin at a position of `text`, as bits. `rules[rule][position]`: the
/// same, as far as known.
fn ends(part: &Part, text: &[char], from: usize, rules: &[Vec<u64>]) -> u64 {
    let then = |starts: u64, part: &Part| {
        let places = (0..=text.len()).filter(|place| starts & (1 << place) != 0);
        places.fold(0, |found, place| found | ends(part, text, place, rules))
    };
    match part {
        Part::Text(literal) => {
            let literal: Vec<char> = literal.chars().collect();
            match text[from..].starts_with(&literal) {
                true => 1 << (from + literal.len()),
                false => 0,
            }
        }
        Part::Class(not, set) => match text.get(from) {
            Some(c) if set.contains(c) != *not => 1 << (from + 1),
            _ => 0,
        },
        Part::Rule(index) => rules[*index][from],
        Part::Seq(parts) => parts.iter().fold(1 << from, then),
        Part::Any(parts) => parts
            .iter()
            .fold(0, |found, part| found | ends(part, text, from, rules)),
        Part::Repeat(part, least, most) => {
            let mut starts = 1 << from;
            for _ in 0..*least {
                starts = then(starts, part);
            }
            let mut found = starts;
            // More than one for each character adds nothing.
            for _ in *least..most.unwrap_or(least + text.len() as u32 + 1) {
                starts = then(starts, part);
                found |= starts;
            }
            found
        }
    }
}

/// The least fixed point: rules start without texts, and get more until nothing changes.
fn is_text(rules: &[Part], text: &[char]) -> bool {
    let mut known = vec![vec![0; text.len() + 1]; rules.len()];
    loop {
        let before = known.clone();
        for (index, rule) in rules.iter().enumerate() {
            for from in 0..=text.len() {
                known[index][from] = ends(rule, text, from, &known);
            }
        }
        if known == before {
            return known[0][0] & (1 << text.len()) != 0;
        }
    }
}

/// All texts of at most this many letters, checked against the masks.
fn compare(rules: &[Part], limited: &mut Limited, text: &mut Vec<char>, most: usize) -> Result<(), TestCaseError> {
    let mask = allowed(limited);
    prop_assert_eq!(mask[END as usize], is_text(rules, text), "{:?}", text);
    if text.len() == most {
        return Ok(());
    }
    // Also with tokens of several letters.
    for (id, token) in model().tokens.iter().enumerate().skip(3) {
        let Ok(token) = std::str::from_utf8(token) else {
            continue;
        };
        if token.is_empty() || !token.chars().all(|c| LETTERS.contains(&c)) || text.len() + token.len() > most {
            continue;
        }
        let before = text.len();
        text.extend(token.chars());
        if mask[id] {
            let mut next = limited.again();
            match next.accept(id as u32).unwrap() {
                // Complete, and nothing may follow.
                true => {
                    prop_assert!(is_text(rules, text), "{:?}", text);
                    prop_assert!(!goes_on(rules, text, most), "{:?} goes on", text);
                }
                false => compare(rules, &mut next, text, most)?,
            }
        } else {
            prop_assert!(!is_text(rules, text), "{:?} is refused", text);
        }
        text.truncate(before);
    }
    Ok(())
}

/// Whether this is a prefix of a longer text.
fn goes_on(rules: &[Part], text: &mut Vec<char>, most: usize) -> bool {
    text.len() < most
        && LETTERS.iter().any(|c| {
            text.push(*c);
            let found = is_text(rules, text) || goes_on(rules, text, most);
            text.pop();
            found
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 250, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn translated_grammars_have_the_same_texts(rules in prop::collection::vec(parts(), RULES)) {
        let lines = rules.iter().enumerate().map(|(index, rule)| format!("{} ::= {}\n", name(index), written(rule)));
        let grammar: String = lines.collect();
        match model().grammars.follow(Form::grammar(grammar.clone())) {
            Ok(mut limited) => {
                let lark = gbnf::to_lark(&grammar).unwrap();
                compare(&rules, &mut limited, &mut Vec::new(), 5)
                    .map_err(|error| TestCaseError::fail(format!("{error}\n{grammar}\n{lark}")))?;
            }
            // Some have rules without an end.
            Err(FormError::Gbnf(gbnf::GbnfError::Endless { .. })) => {}
            Err(error) => prop_assert!(false, "{}\n{}", error, grammar),
        }
    }
}

#[test]
fn the_server_takes_both_forms() {
    let server = Server::start("64,512", &["--max-sequences", "4"]);
    let completion = |grammar: &str| {
        let body = json!({"prompt": [5, 6, 7], "max_tokens": 400, "temperature": 1.5, "top_k": 0, "min_p": 0, "top_p": 1, "n": 4,
            "seed": 3, "grammar": grammar});
        server.post("/v1/completions", &body).ok()["choices"].take()
    };
    let lines = completion("# A list\nroot ::= item{2,3}\nitem ::= \"- \" [a-f]{1,5} \";\"");
    for choice in lines.as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        let lines: Vec<&str> = text.split_terminator(';').collect();
        assert!((2..=3).contains(&lines.len()) && text.ends_with(';'), "{text:?}");
        for line in lines {
            let letters = line.strip_prefix("- ").unwrap();
            assert!(
                (1..=5).contains(&letters.len()) && letters.bytes().all(|c| (b'a'..=b'f').contains(&c)),
                "{text:?}"
            );
        }
        assert_eq!(choice["finish_reason"], "stop");
    }
    let nested = completion("root ::= \"(\" root? \")\" | [xy]");
    for choice in nested.as_array().unwrap() {
        let text = choice["text"].as_str().unwrap();
        let (open, close) = (text.matches('(').count(), text.matches(')').count());
        assert!(text.starts_with(['(', 'x', 'y']), "{text:?}");
        assert!(open == close || choice["finish_reason"] == "length", "{text:?}");
    }
    for (grammar, message) in [
        ("root ::= x", "grammar: GBNF, line 1, column 10: there is no rule \"x\""),
        ("start: x", "grammar: it cannot be followed: "),
    ] {
        let (status, code, said) = server
            .post("/v1/completions", &json!({"prompt": [5], "grammar": grammar}))
            .error();
        assert_eq!((status, &code), (400, &json!("invalid_schema")));
        assert!(said.starts_with(message), "{said}");
    }
}
