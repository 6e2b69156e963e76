//! Finds the paths used in Rust source, with only as much of the language as that needs.

/// What a file uses of its crate.
pub struct Paths {
    /// Line, and the path from the crate's root. A `use` of a group counts once for each of its leaves.
    pub used: Vec<(usize, Vec<String>)>,
    /// Modules in their own files that are compiled only for tests.
    pub test_files: Vec<TestFile>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TestFile {
    /// `mod name;`
    Name(String),
    /// `#[path = "…"] mod name;`
    Path(String),
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    Word(String),
    Text(String),
    Mark(char),
    /// `::`
    PathMark,
}

/// The paths of a source file that is the module `module` (from the crate's root).
pub fn scan(source: &str, module: &[String]) -> Paths {
    let mut walk = Walk {
        tokens: tokens(source),
        at: 0,
        paths: Paths {
            used: Vec::new(),
            test_files: Vec::new(),
        },
    };
    let mut module = module.to_vec();
    walk.items(&mut module);
    walk.paths
}

struct Walk {
    tokens: Vec<(usize, Token)>,
    at: usize,
    paths: Paths,
}

impl Walk {
    fn peek(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead).map(|(_, token)| token)
    }

    fn word(&self, ahead: usize) -> Option<&str> {
        match self.peek(ahead)? {
            Token::Word(word) => Some(word),
            _ => None,
        }
    }

    fn is(&self, ahead: usize, mark: char) -> bool {
        self.peek(ahead) == Some(&Token::Mark(mark))
    }

    /// Everything up to the closing brace of the current block, or to the end.
    fn items(&mut self, module: &mut Vec<String>) {
        while self.at < self.tokens.len() {
            if self.is(0, '}') {
                return;
            }
            if self.is(0, '#') && self.is(1, '[') {
                self.attributes();
            } else if self.word(0) == Some("mod") && self.word(1).is_some() && self.is(2, '{') {
                module.push(self.word(1).unwrap_or_default().to_string());
                self.at += 3;
                self.items(module);
                module.pop();
                self.at += 1;
            } else if self.is(0, '{') {
                self.at += 1;
                self.items(module);
                self.at += 1;
            } else if matches!(self.word(0), Some("crate" | "super" | "self")) && self.peek(1) == Some(&Token::PathMark)
            {
                self.path(module);
            } else {
                self.at += 1;
            }
        }
    }

    /// Attributes, and the item after them if it is only for tests or documentation.
    fn attributes(&mut self) {
        let (mut skipped, mut file) = (false, None);
        while self.is(0, '#') && self.is(1, '[') {
            let start = self.at + 2;
            self.at += 1;
            self.group('[', ']');
            let inside: Vec<&Token> = self.tokens[start..self.at - 1].iter().map(|(_, token)| token).collect();
            match &inside[..] {
                [Token::Word(cfg), rest @ ..] if cfg == "cfg" => {
                    let has = |word: &str| rest.iter().any(|t| **t == Token::Word(word.to_string()));
                    skipped |= (has("test") || has("doc")) && !has("not");
                }
                [Token::Word(path), Token::Mark('='), Token::Text(name)] if path == "path" => file = Some(name.clone()),
                _ => {}
            }
        }
        if !skipped {
            return;
        }
        while !self.is(0, ';') && !self.is(0, '{') && self.at < self.tokens.len() {
            if let (Some("mod"), Some(name), true) = (self.word(0), self.word(1), self.is(2, ';')) {
                let name = TestFile::Name(name.to_string());
                self.paths.test_files.push(file.take().map_or(name, TestFile::Path));
            }
            self.at += 1;
        }
        // `use a::{b, c};` ends with its semicolon, other items with their brace.
        let was_use = self.is(0, '{') && self.tokens[self.at - 1].1 == Token::PathMark;
        self.group('{', '}');
        if was_use && self.is(0, ';') {
            self.at += 1;
        }
    }

    /// Past a group that begins here; past one token if none does.
    fn group(&mut self, open: char, close: char) {
        let mut depth = 0usize;
        while self.at < self.tokens.len() {
            match &self.tokens[self.at].1 {
                Token::Mark(mark) if *mark == open => depth += 1,
                Token::Mark(mark) if *mark == close => depth = depth.saturating_sub(1),
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return;
            }
        }
    }

    /// A path that begins with `crate`, `super` or `self`.
    fn path(&mut self, module: &[String]) {
        let mut path = match self.word(0) {
            Some("crate") => Vec::new(),
            Some("super") => module[..module.len().saturating_sub(1)].to_vec(),
            _ => module.to_vec(),
        };
        self.at += 1;
        while self.peek(0) == Some(&Token::PathMark) && self.word(1) == Some("super") {
            path.pop();
            self.at += 2;
        }
        if self.peek(0) == Some(&Token::PathMark) {
            self.at += 1;
            self.tree(path);
        }
    }

    /// What follows `::`: names, and groups of trees in a `use`.
    fn tree(&mut self, mut path: Vec<String>) {
        let line = self.tokens.get(self.at).map_or(0, |(line, _)| *line);
        loop {
            match self.peek(0) {
                Some(Token::Word(word)) => {
                    if word != "self" {
                        path.push(word.clone());
                    }
                    self.at += 1;
                }
                Some(Token::Mark('{')) => {
                    self.at += 1;
                    while self.at < self.tokens.len() && !self.is(0, '}') {
                        match self.peek(0) {
                            Some(Token::Word(_)) => self.tree(path.clone()),
                            _ => self.at += 1,
                        }
                        if self.word(0) == Some("as") {
                            self.at += 2;
                        }
                    }
                    self.at += 1;
                    return;
                }
                _ => break,
            }
            match self.peek(0) {
                Some(Token::PathMark) => self.at += 1,
                _ => break,
            }
        }
        self.paths.used.push((line, path));
    }
}

/// The tokens of a source with their lines, without comments.
fn tokens(source: &str) -> Vec<(usize, Token)> {
    let chars: Vec<char> = source.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1);
    while i < chars.len() {
        let (start, first) = (i, line);
        let token = match (at(i), at(i + 1)) {
            ('/', '/') => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
                None
            }
            ('/', '*') => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= chars.len() {
                        break None;
                    }
                }
            }
            ('r', '"' | '#') | ('b', 'r') if raw_hashes(&chars, i).is_some() => {
                let (open, hashes) = raw_hashes(&chars, i).unwrap_or_default();
                i = open + 1;
                let text = i;
                while i < chars.len() && !(at(i) == '"' && (1..=hashes).all(|n| at(i + n) == '#')) {
                    i += 1;
                }
                let text = chars[text..i.min(chars.len())].iter().collect();
                i += 1 + hashes;
                Some(Token::Text(text))
            }
            ('"', _) => {
                i += 1;
                while i < chars.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
                Some(Token::Text(chars[start + 1..(i - 1).min(chars.len())].iter().collect()))
            }
            // A character, and not a lifetime.
            ('\'', '\\') => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
                None
            }
            ('\'', _) if at(i + 2) == '\'' => {
                i += 3;
                None
            }
            (':', ':') => {
                i += 2;
                Some(Token::PathMark)
            }
            (c, _) if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                Some(Token::Word(chars[start..i].iter().collect()))
            }
            (c, _) => {
                i += 1;
                (!c.is_whitespace()).then_some(Token::Mark(c))
            }
        };
        line += chars[start..i.min(chars.len())].iter().filter(|c| **c == '\n').count();
        out.extend(token.map(|token| (first, token)));
    }
    out
}

/// The position of the quote of a raw string that begins at `i`, and its number of `#`.
fn raw_hashes(chars: &[char], i: usize) -> Option<(usize, usize)> {
    let mut at = i + usize::from(chars[i] == 'b');
    if chars.get(at) != Some(&'r') {
        return None;
    }
    at += 1;
    let open = at + chars[at..].iter().take_while(|c| **c == '#').count();
    (chars.get(open) == Some(&'"')).then_some((open, open - at))
}
