//! The contents of transformers' environment for chat templates, and whether they are supported here.
//!
//! The lists are those of Jinja 3.1, in its own order; docs/reference/chat-templates.md is written from [`ENVIRONMENT`].

/// Filters, alphabetically.
pub const FILTERS: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
];

/// Tests, alphabetically.
pub const TESTS: [&str; 39] = [
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

/// Built-in functions.
pub const GLOBALS: [&str; 8] = [
    "cycler",
    "dict",
    "joiner",
    "lipsum",
    "namespace",
    "raise_exception",
    "range",
    "strftime_now",
];

/// Methods of text.
pub const STRING_METHODS: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];

/// Methods of lists; tuples have `count` and `index`.
pub const LIST_METHODS: [&str; 11] = [
    "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse", "sort",
];

/// Methods of dicts.
pub const DICT_METHODS: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];

/// Statements of Jinja and of the extensions that transformers loads.
pub const STATEMENTS: [&str; 18] = [
    "autoescape",
    "block",
    "break",
    "call",
    "continue",
    "extends",
    "filter",
    "for",
    "from",
    "generation",
    "if",
    "import",
    "include",
    "macro",
    "print",
    "raw",
    "set",
    "with",
];

/// The refused ones among them.
pub const STATEMENTS_REFUSED: [&str; 6] = ["autoescape", "block", "extends", "from", "import", "include"];

/// Attributes of numbers that Python has, which would be undefined otherwise.
pub(super) const NUMBER_ATTRIBUTES: [&str; 14] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "denominator",
    "from_bytes",
    "fromhex",
    "hex",
    "imag",
    "is_integer",
    "numerator",
    "real",
    "to_bytes",
    "from_number",
];

/// The support of a part of the environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// Supported: the result is Jinja's.
    Yes,
    /// Supported except for this, which is refused.
    Except(&'static str),
    /// It is refused by name.
    No(&'static str),
    /// Refused, as by Jinja's sandbox.
    Sandbox,
}

/// A kind of entry, as named in the fixture; its title; its entries.
pub const ENVIRONMENT: [(&str, &str, &[&str]); 7] = [
    ("statement", "Statements", &STATEMENTS),
    ("filter", "Filters", &FILTERS),
    ("test", "Tests", &TESTS),
    ("global", "Functions", &GLOBALS),
    ("string", "Methods of text", &STRING_METHODS),
    ("list", "Methods of lists", &LIST_METHODS),
    ("dict", "Methods of dicts", &DICT_METHODS),
];

/// Whether an entry of [`ENVIRONMENT`] is supported.
pub fn support(kind: &str, name: &str) -> Support {
    const CLASSES: Support =
        Support::Except("text beyond the Latin letters, whose classes Python knows by its own tables");
    const TITLE: Support = Support::Except("a first character whose title case is not its upper case, such as ß");
    match (kind, name) {
        ("statement", "autoescape") => Support::No("prompts are not HTML"),
        ("statement", name) if STATEMENTS_REFUSED.contains(&name) => Support::No("a model has one template"),
        ("filter", "random") => Support::No("a prompt is not drawn by lot"),
        ("filter", "urlize") => Support::No("prompts are not HTML"),
        ("filter", "capitalize") => TITLE,
        ("filter", "pprint") => Support::Except("what is longer than a line of 80 characters"),
        ("filter", "sum") => Support::Except("floats whose sum depends on the version of Python"),
        ("filter", "striptags") => Support::Except("HTML entities but the six of escaped text"),
        ("filter", "wordcount") => CLASSES,
        ("filter", "wordwrap") => Support::Except("text with hyphens"),
        ("test", "sameas") => Support::Except("large integers, floats and text, whose identity is Python's affair"),
        ("global", "lipsum") => Support::No("it is random"),
        ("global", "strftime_now") => {
            Support::Except("directives, flags and widths that depend on the system's C library")
        }
        ("string", "encode") => Support::No("it gives bytes"),
        ("string", "format_map") => Support::No("use format"),
        ("string", "maketrans" | "translate") => Support::No("use replace"),
        ("string", "capitalize" | "title") => TITLE,
        ("string", "casefold") => Support::Except("text beyond ASCII"),
        ("string", "swapcase") => Support::Except("text with Σ"),
        ("string", "isalnum" | "isalpha" | "isdecimal" | "isdigit" | "isidentifier" | "isnumeric" | "istitle") => {
            CLASSES
        }
        ("string", "format") => Support::Except("the format n, a precision without a type, zeros with separators"),
        ("string", "replace") => Support::Except("count as a named argument, which is of Python 3.13"),
        ("list", "copy" | "count" | "index") => Support::Yes,
        ("list", _) => Support::Sandbox,
        ("dict", "copy" | "get" | "items" | "keys" | "values") => Support::Yes,
        ("dict", "fromkeys") => Support::No("use dict(…)"),
        ("dict", _) => Support::Sandbox,
        _ => Support::Yes,
    }
}
