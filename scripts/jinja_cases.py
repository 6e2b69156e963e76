#!/usr/bin/env python3
"""Writes fixtures/jinja/cases.json: templates and their results in transformers' Jinja environment.

    pip install jinja2==3.1.6
    python scripts/jinja_cases.py

The environment is the one that `transformers.utils.chat_template_utils` makes (5.24): Jinja's immutable sandbox with
trim_blocks, lstrip_blocks, loop controls, `generation` blocks, its own `tojson`, `raise_exception` and `strftime_now`.
A case is [what it shows, template, text], with null for a template that Jinja refuses. What a case shows begins with the
name of an entry of the environment, `filter abs` for example; tests/decode/jinja.rs says which of them must be supported.
"""
import datetime
import json
import os
import re

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2026, 1, 5, 7, 8, 9, 123)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there "},
    {"role": "assistant", "content": "<b>Hello</b>\nyou"},
    {"role": "user", "content": "é世😀 \"q\" & 'a'\\\r\nend\t"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


class Generation(jinja2.ext.Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("body"), [], [], body).set_lineno(line)

    def body(self, caller):
        return caller()


def environment():
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda format: NOW.strftime(format)
    return env


def render(template):
    try:
        text = environment().from_string(template).render(
            messages=MESSAGES, tools=None, documents=None, add_generation_prompt=True, **SPECIAL
        )
    except Exception:  # A template that does not render, for whatever reason.
        return None
    # Addresses are others in every run.
    return re.sub(r" at 0x[0-9a-f]+>", " at 0x0>", text)


def printed(*expressions):
    """Templates that print an expression each."""
    return ["{{ " + e + " }}" for e in expressions]


FILTERS = {
    "abs": ["(-3)|abs", "(-2.5)|abs", "'x'|abs"],
    "attr": ["{'a': 1}|attr('a')", "'x'|attr('upper')", "messages[0]|attr('role')", "('x'|attr('nope')) is defined"],
    "batch": ["[1,2,3,4,5]|batch(2)|list", "[1,2,3]|batch(2, 'x')|list", "'abc'|batch(2)|list", "[]|batch(3)|list"],
    "capitalize": ["'hELLO wORLD'|capitalize", "''|capitalize", "'éA'|capitalize", "5|capitalize", "'ßa'|capitalize"],
    "center": ["'ab'|center(7)", "'ab'|center(6)", "'abc'|center(8) ~ '|'", "'x'|center|length", "'abcdef'|center(3)"],
    "count": ["[1,2]|count", "'héllo'|count", "{'a':1}|count", "(1,2,3)|count", "5|count", "range(4)|count"],
    "d": ["nope|d('x')", "none|d('x')", "none|d('x', true)", "''|d('x', true)", "nope|d", "nope.a|d('x')"],
    "default": ["nope|default('x')", "none|default('x')", "none|default('x', true)", "''|default('x', boolean=true)",
        "0|default(5, true)", "nope|default(default_value='y')", "messages[0].nope|default('z')", "messages[9]|default('z')"],
    "dictsort": ["{'b':1,'A':2,'a':3}|dictsort", "{'b':1,'A':2}|dictsort(true)", "{'b':1,'a':2}|dictsort(by='value')",
        "{'b':1,'a':2}|dictsort(false, 'value', true)", "{'b':1,'a':2}|dictsort(reverse=true)", "[1]|dictsort"],
    "e": ["'<a href=\"x\">&\\'</a>'|e", "5|e", "none|e", "'<'|e|e", "['<']|e"],
    "escape": ["'<b>&'|escape", "('<b>'|safe)|escape", "('<b>'|escape) ~ '<i>'", "('<b>'|escape)|length", "nope|escape"],
    "filesizeformat": ["1|filesizeformat", "0|filesizeformat", "999|filesizeformat", "1000|filesizeformat", "13000|filesizeformat",
        "1300000|filesizeformat", "1234567890|filesizeformat(true)", "1024|filesizeformat(true)", "'500'|filesizeformat",
        "1500.5|filesizeformat(binary=true)"],
    "first": ["[1,2]|first", "'héy'|first", "{'a':1}|first", "([]|first) is undefined", "[]|first", "range(3,5)|first", "5|first"],
    "float": ["'3.5'|float", "'x'|float", "'x'|float(1.5)", "3|float", "none|float", "'1e3'|float", "' 2 '|float", "'1_0'|float",
        "true|float", "'inf'|float", "'nan'|float", "[]|float", "'x'|float(default=2)", "1e20|float", "1e-7|float", "123456789.123|float"],
    "forceescape": ["'<b>'|forceescape", "('<b>'|safe)|forceescape", "('<b>'|escape)|forceescape"],
    "format": ["'%s-%d'|format('a', 3)", "'%s'|format([1,'x'])", "'%(a)s'|format(a=1)", "'%5.2f|%-5s|%05d'|format(3.14159,'ab',42)",
        "'%x %X %o %e %g %c %r %%'|format(255,255,8,12345.678,0.0001,'z','q')", "'%s'|format", "'%s'|format(1,2)", "'%+d % d'|format(1,2)",
        "'%s %s'|format(none, true)", "'%i'|format(3.7)", "'%.3s|'|format('abcdef')", "'%*d'|format(5, 42)", "'%#x'|format(255)"],
    "groupby": ["[{'a':1,'b':2},{'a':2,'b':3},{'a':1,'b':4}]|groupby('a')|map('first')|list",
        "messages|groupby('role')|map(attribute='grouper')|list",
        "[{'a':'x'},{'a':'X'}]|groupby('a')|map('first')|list", "[{'a':1},{}]|groupby('a', default=0)|map('first')|list",
        "[{'a':{'b':2}},{'a':{'b':1}}]|groupby('a.b')|map('first')|list", "[{'a':'x'},{'a':'X'}]|groupby('a', case_sensitive=true)|map('first')|list"],
    "indent": ["'a\\nb\\n\\nc'|indent", "'a\\nb'|indent(2)", "'a\\nb'|indent(2, true)", "'a\\n\\nb'|indent(2, false, true)",
        "'a\\nb'|indent('> ')", "'a\\n'|indent(2) ~ '|'", "'a\\nb'|indent(width=1, first=true)", "''|indent(3, true)", "'a\\n\\nb'|indent(2, blank=true)"],
    "int": ["'42'|int", "'abc'|int", "'abc'|int(7)", "3.9|int", "'3.9'|int", "(-3.9)|int", "'0x1f'|int(0, 16)", "'0b11'|int(base=2)",
        "'12'|int(base=8)", "none|int", "true|int", "' 7 '|int", "'1_000'|int", "''|int", "[]|int", "'1e3'|int", "'ff'|int(0,16)", "'z'|int(default=3)"],
    "items": ["{'a':1,'b':2}|items|list", "nope|items|list", "[1]|items|list", "{}|items|list"],
    "join": ["[1,'a',none]|join", "['a','b']|join(', ')", "messages|join('|', 'role')", "messages|join('|', attribute='role')", "'abc'|join('-')",
        "[]|join(',')", "['<', '>'|escape]|join", "[1.0, true]|join(d=' ')", "range(3)|join(',')", "{'a':1,'b':2}|join(',')", "5|join"],
    "last": ["[1,2]|last", "'hé'|last", "([]|last) is undefined", "{'a':1,'b':2}|last", "range(3)|last", "5|last"],
    "length": ["[1,2]|length", "'héé'|length", "{'a':1}|length", "nope|length", "5|length", "none|length", "range(7)|length"],
    "list": ["'abc'|list", "{'a':1}|list", "(1,2)|list", "range(3)|list", "5|list", "nope|list", "none|list"],
    "lower": ["'ABC É İ'|lower", "5|lower", "true|lower", "'ΑΣ'|lower", "none|lower"],
    "map": ["messages|map(attribute='role')|list", "['a','b']|map('upper')|list", "[{'a':1},{}]|map(attribute='a', default=0)|list",
        "[[1,2],[3]]|map('length')|list", "[{'a':{'b':1}}]|map(attribute='a.b')|list", "[[5,6]]|map(attribute=1)|list", "['a']|map('nope')|list",
        "['ab']|map('replace','a','x')|list", "[1,2]|map|list", "['x y']|map('split')|list", "messages|map('attr','role')|list", "[{'a':1},{}]|map(attribute='a')|list",
        "[3,1]|map('string')|join", "['1','2']|map('int')|sum"],
    "max": ["[1,3,2]|max", "['a','B']|max", "['a','B']|max(true)", "[]|max", "messages|max(attribute='role')", "'abc'|max", "[1,2.5]|max"],
    "min": ["[2,1]|min", "['b','A']|min", "['a','B']|min(true)", "[]|min", "messages|map('length')|min", "[{'a':2},{'a':1}]|min(attribute='a')"],
    "pprint": ["[1,'a']|pprint", "{'a':1}|pprint", "'x'|pprint", "{'b':[1,2],'a':none}|pprint", "1.5|pprint"],
    "random": ["([5]|random)", "'a'|random", "[]|random"],
    "reject": ["[1,2,3,4]|reject('odd')|list", "[0,1,'',none]|reject|list", "[1,2]|reject('nope')|list", "[1,2,3]|reject('gt', 1)|list"],
    "rejectattr": ["messages|rejectattr('role','equalto','user')|map(attribute='role')|list", "[{'a':1},{'a':0},{}]|rejectattr('a')|list",
        "messages|rejectattr('nope','defined')|list|length", "messages|rejectattr('role','in',['user'])|list|length"],
    "replace": ["'aXbX'|replace('X','-')", "'aXbX'|replace('X','-',1)", "'abc'|replace('','-')", "'aaa'|replace('aa','b')", "5|replace('5','6')",
        "'<a>'|replace('<','&')", "'abc'|replace('b', count=1, new='z')", "'abab'|replace('b','', -1)", "'x'|replace('x', 1)"],
    "reverse": ["'abc'|reverse", "[1,2]|reverse|list", "(1,2)|reverse|list", "'aé😀'|reverse", "range(3)|reverse|list", "5|reverse", "{'a':1,'b':2}|reverse|list"],
    "round": ["2.5|round", "3.5|round", "2.675|round(2)", "(-2.5)|round", "2.1|round(method='ceil')", "2.9|round(0,'floor')", "1234.5|round(-2)", "3|round", "42.55|round(1)", "'x'|round", "2.15|round(1,'ceil')", "7|round(2)"],
    "safe": ["'<b>'|safe", "5|safe", "('<b>'|safe) ~ '&'", "('<b>'|safe) is escaped"],
    "select": ["[1,2,3]|select('odd')|list", "[0,1,'',none,[]]|select|list", "[1,5,3]|select('gt', 2)|list", "['a',1]|select('string')|list", "[1]|select('nope')|list",
        "[1,2,none]|select('ne', none)|list", "[1,2,3,4]|select('divisibleby', 2)|list", "['a','b']|select('in',['b'])|list", "[nope, 1]|select('defined')|list"],
    "selectattr": ["messages|selectattr('role','equalto','user')|map(attribute='content')|list", "[{'a':1},{'a':0},{}]|selectattr('a')|list",
        "messages|selectattr('role','==','system')|list|length", "messages|selectattr('role','ne','user')|map(attribute='role')|join(',')",
        "messages|selectattr('nope','undefined')|list|length", "[{'a':{'b':1}},{'a':{}}]|selectattr('a.b')|list", "messages|selectattr('content','string')|list|length",
        "messages|selectattr('role','in',['user','tool'])|list|length", "messages|selectattr('role','eq','user')|first", "messages|selectattr('role','nope')|list"],
    "slice": ["[1,2,3,4,5]|slice(2)|list", "[1,2,3]|slice(2,'x')|list", "[1,2,3,4,5,6,7]|slice(3)|list", "[]|slice(2)|list", "'abcde'|slice(2)|list"],
    "sort": ["[3,1,2]|sort", "['b','A','a']|sort", "['b','A','a']|sort(case_sensitive=true)", "[3,1]|sort(true)", "messages|sort(attribute='role')|map(attribute='role')|list",
        "[{'a':2,'b':1},{'a':1,'b':2}]|sort(attribute='a,b')", "'cab'|sort", "[1,'a']|sort", "['B','a','C']|sort(reverse=true)", "[(2,'a'),(1,'b')]|sort", "{'b':1,'a':2}|sort"],
    "string": ["5|string", "none|string", "[1,'a']|string", "1.0|string", "true|string ~ 1", "'x'|string", "nope|string", "(1,)|string"],
    "striptags": ["'<b>a</b>  <i>b</i>\\n c'|striptags", "'a<!-- x -->b &amp; c'|striptags", "5|striptags", "'a &lt; b'|striptags", "'<a'|striptags", "'a > b'|striptags"],
    "sum": ["[1,2,3]|sum", "[1,2]|sum(start=10)", "[{'a':1},{'a':2}]|sum(attribute='a')", "[]|sum", "[1.5,2]|sum", "[[1],[2]]|sum(start=[])", "['a']|sum", "[{'a':1},{'a':2}]|sum('a', 5)"],
    "title": ["'hello world-foo (bar) it\\'s'|title", "'HELLO'|title", "'a_b c.d'|title", "5|title", "'élan vital'|title", "'x<y [z] {w}'|title", "''|title"],
    "tojson": ["{'b':1,'a':[]}|tojson", "{'b':1,'a':[]}|tojson(separators=(',',':'))", "{'b':1,'a':2}|tojson(sort_keys=true)", "'é世😀'|tojson(ensure_ascii=true)",
        "'é世😀<&>\\''|tojson", "{'a':[1,{'b':2}],'c':{}}|tojson(indent=2)", "{'a':[1,2]}|tojson(indent=0)", "[1,2]|tojson(indent='--')", "{'a':[]}|tojson(indent=2)", "{'a':{}}|tojson(indent=1)",
        "none|tojson", "true|tojson", "1.0|tojson", "1e100|tojson", "1e-7|tojson", "1e16|tojson", "123456789012345678901234567890|tojson", "{1:2,true:3,none:4,1.5:6}|tojson", "(1,2)|tojson", "'\\n\\t\\x01\\x7f\\u2028'|tojson",
        "{'b':{'z':1,'y':2},'a':3}|tojson(indent=2, sort_keys=true)", "{'a':1}|tojson(separators=(', ',' : '), indent=1)", "messages[0]|tojson", "nope|tojson", "range(3)|tojson",
        "[1,[2,[]],{}]|tojson(indent=4)", "{'a':1}|tojson(ensure_ascii=false, indent=none)", "('<'|escape)|tojson", "{'a':1}|tojson(true)", "{'a':1}|tojson(false, 2)", "[0.1, 1e21, -0.0, 1.5e300, 100000000000000000000.0]|tojson",
        "{'a':1,'b':2}|tojson(separators=['; ','= '])", "{'a':1}|tojson(nope=1)", "'\\\\ \"'|tojson", "{'a':'<b>'}|tojson|length", "{'é':'ü'}|tojson(true)", "[1,2]|tojson(separators=(',',':'),indent=2)", "{(1,2):3}|tojson", "{'10':1,'9':2,'B':3,'a':4}|tojson(sort_keys=true)"],
    "trim": ["'  a '|trim ~ '|'", "'xxaxx'|trim('x')", "'abcba'|trim('ab')", "5|trim", "none|trim", "'\\u00a0a\\u2003'|trim ~ '|'", "'\\x1fa\\x1c'|trim ~ '|'", "nope|trim", "' a '|trim(none) ~ '|'"],
    "truncate": ["'hello there you'|truncate(8)", "'hello there you'|truncate(8, true)", "'hello there you'|truncate(11, false, '>', 0)", "'hello'|truncate(4)", "'hello there'|truncate(9, end='…', leeway=0)",
        "'hello there you'|truncate(10, leeway=0)", "'x'|truncate", "('word ' * 60)|truncate|length", "'foo bar baz qux'|truncate(11)", "'foo bar baz qux'|truncate(11, True)", "'foo bar baz qux'|truncate(11, False, '...', 0)", "'hello'|truncate(1)"],
    "unique": ["[1,1,2]|unique|list", "['a','A','b']|unique|list", "['a','A']|unique(true)|list", "messages|unique(attribute='role')|map(attribute='role')|list", "'abca'|unique|join", "[1,1.0,true]|unique|list"],
    "upper": ["'abc é ß'|upper", "5|upper", "none|upper"],
    "urlencode": ["'a b/c?d=é&'|urlencode", "{'a':'b c','d':'/'}|urlencode", "[('x',1),('y','ä')]|urlencode", "'~_.-'|urlencode", "5|urlencode", "''|urlencode"],
    "urlize": ["'see http://x.org now'|urlize", "'www.a.com'|urlize", "'nothing'|urlize", "'mail me@x.org'|urlize"],
    "wordcount": ["'a b'|wordcount", "'héllo wörld, it\\'s'|wordcount", "''|wordcount", "'a-b_c'|wordcount", "5|wordcount", "'  x  '|wordcount"],
    "wordwrap": ["'hello there you all'|wordwrap(8)", "'abcdefghij'|wordwrap(4)", "'abcdefghij kl'|wordwrap(4, false)", "'a b c d'|wordwrap(3, wrapstring='|')", "'one\\ntwo three'|wordwrap(5)", "'x-y-z foo'|wordwrap(4)"],
    "xmlattr": ["{'a':1,'b':none,'c':'<'}|xmlattr", "{'a':1}|xmlattr(false)", "{}|xmlattr"],
}

TESTS = {
    "!=": ["[1,2]|select('!=', 1)|list"],
    "<": ["[1,2,3]|select('<', 2)|list"],
    "<=": ["[1,2,3]|select('<=', 2)|list"],
    "==": ["[1,2]|select('==', 1)|list", "[1, 1.0, true, '1']|select('==', 1)|list"],
    ">": ["[1,2,3]|select('>', 2)|list"],
    ">=": ["[1,2,3]|select('>=', 2)|list"],
    "boolean": ["true is boolean", "1 is boolean", "none is boolean"],
    "callable": ["range is callable", "5 is callable", "'x'.upper is callable", "raise_exception is callable", "namespace is callable", "nope is callable", "joiner(',') is callable"],
    "defined": ["nope is defined", "messages is defined", "messages[0].nope is defined", "messages[9] is defined", "none is defined", "nope is not defined"],
    "divisibleby": ["6 is divisibleby(3)", "7 is divisibleby 2", "6.0 is divisibleby 3"],
    "eq": ["1 is eq 1", "'a' is eq 'b'", "1 is eq 1.0", "[1] is eq [1]"],
    "equalto": ["1 is equalto 1", "none is equalto none", "true is equalto 1"],
    "escaped": ["'x' is escaped", "('x'|safe) is escaped", "('x'|escape) is escaped"],
    "even": ["2 is even", "3 is even", "2.0 is even"],
    "false": ["false is false", "0 is false", "none is false"],
    "filter": ["'upper' is filter", "'nope' is filter", "'tojson' is filter", "'truncate' is filter", "'split' is filter", "'bool' is filter"],
    "float": ["1.0 is float", "1 is float", "'1.0' is float"],
    "ge": ["2 is ge 2", "'b' is ge 'a'"],
    "greaterthan": ["3 is greaterthan 2"],
    "gt": ["3 is gt 3", "3 is gt(1)"],
    "in": ["1 is in [1,2]", "'a' is in 'abc'", "'k' is in {'k':1}", "3 is not in [1]", "1 is in 5"],
    "integer": ["1 is integer", "1.0 is integer", "true is integer", "'1' is integer"],
    "iterable": ["[1] is iterable", "'a' is iterable", "5 is iterable", "{} is iterable", "none is iterable", "range(2) is iterable", "nope is iterable"],
    "le": ["2 is le 1"],
    "lessthan": ["2 is lessthan 3"],
    "lower": ["'abc' is lower", "'aBc' is lower", "'1' is lower", "5 is lower", "'' is lower"],
    "lt": ["1 is lt 2"],
    "mapping": ["{} is mapping", "[] is mapping", "messages[0] is mapping", "namespace() is mapping"],
    "ne": ["1 is ne 2", "1 is ne 1.0"],
    "none": ["none is none", "nope is none", "0 is none", "None is none", "tools is none"],
    "number": ["1 is number", "1.5 is number", "true is number", "'1' is number", "none is number"],
    "odd": ["3 is odd", "2 is odd", "3.0 is odd"],
    "sameas": ["none is sameas none", "true is sameas true", "1 is sameas 1", "true is sameas 1", "false is sameas false", "[] is sameas []"],
    "sequence": ["[1] is sequence", "'a' is sequence", "{} is sequence", "5 is sequence", "(1,) is sequence", "none is sequence", "range(3) is sequence", "nope is sequence"],
    "string": ["'a' is string", "1 is string", "('a'|safe) is string", "none is string", "messages[0].content is string"],
    "test": ["'odd' is test", "'nope' is test", "'startingwith' is test", "'safe' is test"],
    "true": ["true is true", "1 is true", "True is true"],
    "undefined": ["nope is undefined", "messages is undefined", "messages[0].nope is undefined", "messages[0]['nope'] is undefined", "none is undefined"],
    "upper": ["'ABC' is upper", "'AbC' is upper", "'1A' is upper", "'' is upper"],
}

GLOBALS = {
    "cycler": ["cycler('a','b').next()", "cycler('a','b').current"],
    "dict": ["dict(a=1,b=2)", "dict({'a':1}, b=2)", "dict([('x',1)])", "dict()", "dict(a=1).a", "dict({'a':1}).items()|list"],
    "joiner": ["joiner(',') is callable", "joiner()() ~ '|'"],
    "lipsum": ["lipsum(n=1, html=false, min=5, max=6)|length > 5"],
    "namespace": ["namespace(a=1).a", "namespace({'a':2}).a", "namespace(a=1).b is defined", "namespace()", "namespace(a=1)['a']"],
    "range": ["range(3)", "range(1,4)|list", "range(5,0,-2)|list", "range(0)|list", "range(3)[1]", "range(3)|length", "range(100001)|length", "2 in range(3)", "range(-2)|list", "range(1,10,3)[-1]", "range(5)[1:3]"],
    "raise_exception": ["raise_exception('no')", "raise_exception() "],
    "strftime_now": ["strftime_now('%Y')|length", "strftime_now('%d %B %Y')|length > 5", "strftime_now('100%')", "strftime_now('%H%f')|length", "strftime_now('%Y %Z')|length", "strftime_now('%Y%z')|length",
        "strftime_now('')", "strftime_now('%%')", "strftime_now('é世')", "strftime_now('%y-%m-%d')|length", "strftime_now('%-d')|int > 0", "strftime_now('%j')|length", "strftime_now('%e')|length", "strftime_now()", "strftime_now('%A, %B')|length > 5"],
}

STRINGS = {
    "capitalize": ["'hELLO'.capitalize()", "'ǆx'.capitalize()"],
    "casefold": ["'Straße ΑΣ'.casefold()", "'ABC'.casefold()"],
    "center": ["'ab'.center(7, '*')", "'ab'.center(5) ~ '|'", "'ab'.center(1)", "'a'.center(4,'-')", "'abc'.center(6,'-')"],
    "count": ["'aXaXa'.count('a')", "'aaaa'.count('aa')", "'abc'.count('')", "'aXaXa'.count('a', 1)", "'aXaXa'.count('a', 1, 4)"],
    "encode": ["'é'.encode()", "'a'.encode('utf-8')"],
    "endswith": ["'abc'.endswith('c')", "'abc'.endswith(('x','bc'))", "'abc'.endswith('b', 0, 2)", "'abc'.endswith('')", "'abc'.endswith(('x','y'))", "'abc'.endswith(['c'])"],
    "expandtabs": ["'a\\tb'.expandtabs()", "'a\\tb\\n\\tc'.expandtabs(4)"],
    "find": ["'abcabc'.find('c')", "'abc'.find('x')", "'abcabc'.find('a', 1)", "'héllo'.find('l')", "'abcabc'.find('a', -3)", "'abcabc'.find('c', 3, 5)", "'abc'.find('')"],
    "format": ["'{} {}'.format(1, 'a')", "'{0} {1} {0}'.format('x','y')", "'{a}'.format(a=5)", "'{:>5}|{:<5}|{:^5}|'.format('a','b','c')", "'{:05.1f} {:,} {:x} {:+d}'.format(3.14159, 1234567, 255, 5)", "'{{}}'.format()", "'{!r}'.format('a')",
        "'{0[a]}'.format({'a': 1})", "'{0.a}'.format({'a': 1})", "'{}'.format(none)", "'{}'.format([1,'a'])", "'{:d}'.format(3)", "'{}'.format()", "'{:.2%}'.format(0.5)", "'{:e}'.format(12345.678)", "'{:*^9}'.format('x')", "'{}'.format(true)", "'{:5}|'.format(3)", "'{:#x} {:b} {:o}'.format(255,5,8)", "'{:s}'.format('a')", "'{:.3}'.format('abcdef')", "'{:n}'.format(5)", "'{:_}'.format(1234567)", "'{:g}'.format(0.5)", "'{:10.3e}|'.format(3.14159)", "'{:>{}}|'.format('a', 4)", "'{:d}'.format(1.5)", "'{:5}|'.format(true)", "'{:5}|'.format([1])"],
    "format_map": ["'{a}'.format_map({'a': 1})"],
    "index": ["'abc'.index('b')", "'abc'.index('x')", "'abcb'.index('b', 2)"],
    "isalnum": ["'aé1'.isalnum()", "''.isalnum()", "'a b'.isalnum()", "'²'.isalnum()"],
    "isalpha": ["'aé'.isalpha()", "'a1'.isalpha()", "''.isalpha()"],
    "isascii": ["'abc'.isascii()", "'é'.isascii()", "''.isascii()"],
    "isdecimal": ["'12'.isdecimal()", "'²'.isdecimal()", "'½'.isdecimal()", "''.isdecimal()", "'٣'.isdecimal()"],
    "isdigit": ["'12'.isdigit()", "'²'.isdigit()", "'½'.isdigit()", "''.isdigit()", "'1.5'.isdigit()", "'-1'.isdigit()", "'٣'.isdigit()"],
    "isidentifier": ["'a1'.isidentifier()", "'1a'.isidentifier()", "''.isidentifier()", "'_é'.isidentifier()", "'a-b'.isidentifier()"],
    "islower": ["'abc1'.islower()", "'aB'.islower()", "'1'.islower()", "''.islower()"],
    "isnumeric": ["'12'.isnumeric()", "'²'.isnumeric()", "'½'.isnumeric()", "'五'.isnumeric()", "''.isnumeric()"],
    "isprintable": ["'ab c'.isprintable()", "'a\\n'.isprintable()", "''.isprintable()", "'\\u00a0'.isprintable()"],
    "isspace": ["' \\t\\n'.isspace()", "''.isspace()", "' a'.isspace()", "'\\u00a0'.isspace()", "'\\x1c'.isspace()"],
    "istitle": ["'Hello World'.istitle()", "'Hello world'.istitle()", "''.istitle()"],
    "isupper": ["'ABC1'.isupper()", "'Ab'.isupper()", "'1'.isupper()"],
    "join": ["', '.join(['a','b'])", "''.join(messages|map(attribute='role'))", "'-'.join('abc')", "','.join([1])", "','.join([])", "','.join({'a':1,'b':2})", "','.join(('x','y'))"],
    "ljust": ["'ab'.ljust(5) ~ '|'", "'ab'.ljust(5,'*')", "'abc'.ljust(2)"],
    "lower": ["'ABC É'.lower()"],
    "lstrip": ["'  a '.lstrip() ~ '|'", "'xxay'.lstrip('x')", "'abca'.lstrip('ba')", "'\\n\\u00a0a'.lstrip()", "'\\x1ca'.lstrip()|length"],
    "maketrans": ["'a'.maketrans('a','b')"],
    "partition": ["'a-b-c'.partition('-')", "'abc'.partition('-')", "'a-b'.partition('-')[2]", "'a'.partition('')"],
    "removeprefix": ["'p-x'.removeprefix('p-')", "'x'.removeprefix('y')", "'ppx'.removeprefix('p')"],
    "removesuffix": ["'x.py'.removesuffix('.py')", "'x'.removesuffix('')", "'x'.removesuffix('y')"],
    "replace": ["'aXbX'.replace('X','-')", "'aXbX'.replace('X','-',1)", "'abc'.replace('','-')", "'abc'.replace('b','')", "'aXbX'.replace('X','-',count=1)", "'aXbX'.replace('X','-',-1)", "'aXbX'.replace('X','-',0)", "'abc'.replace('','-',2)", "'abc'.replace('b',1)"],
    "rfind": ["'abcabc'.rfind('c')", "'abc'.rfind('x')", "'héhé'.rfind('h')", "'abcabc'.rfind('a', 0, 3)", "'abc'.rfind('')"],
    "rindex": ["'abcb'.rindex('b')", "'abc'.rindex('x')"],
    "rjust": ["'ab'.rjust(5) ~ '|'", "'7'.rjust(3,'0')"],
    "rpartition": ["'a-b-c'.rpartition('-')", "'abc'.rpartition('-')"],
    "rsplit": ["'a.b.c'.rsplit('.', 1)", "'a b  c'.rsplit()", "'a.b.c'.rsplit('.')", "' a b  c '.rsplit(none, 1)", "'a.b'.rsplit('.', maxsplit=1)", "'a b c'.rsplit(maxsplit=1)", "'a.b.c'.rsplit(sep='.', maxsplit=0)", "''.rsplit()", "''.rsplit(',')", "'  a  b  '.rsplit(maxsplit=1)"],
    "rstrip": ["' a  '.rstrip() ~ '|'", "'axx'.rstrip('x')", "'a\\n\\n'.rstrip('\\n')", "'abba'.rstrip('ab')"],
    "split": ["'a b  c'.split()", "'a,b,,c'.split(',')", "'a b c'.split(maxsplit=1)", "'a,b,c'.split(',', 1)", "'a<x>b'.split('<x>')[-1]", "' a b  c '.split(none, 1)", "''.split()", "''.split(',')", "'a,b'.split(sep=',')", "'abc'.split('')", "'a\\u00a0b\\x1cc'.split()",
        "'</think>x'.split('</think>')[-1]", "'a b'.split(' ')", "'  a  b  '.split(maxsplit=1)", "'a,b,c'.split(',', maxsplit=0)", "'a,b,c'.split(',', -1)", "'  a  b  '.split(none, 0)"],
    "splitlines": ["'a\\nb\\r\\nc\\rd'.splitlines()", "'a\\nb\\n'.splitlines(true)", "'a\\u2028b\\x0bc\\x0cd\\x1ce\\x85f'.splitlines()", "''.splitlines()", "'a\\n\\nb'.splitlines(keepends=true)", "'\\n'.splitlines()"],
    "startswith": ["'abc'.startswith('a')", "'abc'.startswith(('x','ab'))", "'abc'.startswith('b', 1)", "'abc'.startswith('b', 1, 2)", "'abc'.startswith('')", "'abc'.startswith(1)", "'abc'.startswith('c', -1)", "'abc'.startswith('', 5)"],
    "strip": ["'  a '.strip() ~ '|'", "'xaxx'.strip('x')", "'\\n a \\t'.strip()", "'abcab'.strip('ba')", "'\\u00a0\\u2003a\\u3000'.strip()|length", "'\\x1ca\\x1f'.strip()|length", "'\\u200ba'.strip()|length", "' a '.strip(none) ~ '|'"],
    "swapcase": ["'aBc É'.swapcase()", "'ß'.swapcase()"],
    "title": ["\"hello world it's x-y\".title()", "'HELLO wOrld'.title()", "'a1b c'.title()", "'éa'.title()"],
    "translate": ["'abc'.translate({97: 'x'})"],
    "upper": ["'abc ß'.upper()"],
    "zfill": ["'7'.zfill(3)", "'-7'.zfill(4)", "'+'.zfill(3)", "'abc'.zfill(2)", "''.zfill(2)"],
}

LISTS = {
    "append": ["[1].append(2)"], "clear": ["[1].clear()"], "copy": ["[1,2].copy()"], "count": ["[1,2,1].count(1)", "(1,1).count(1)", "[1,1.0,true].count(1)"],
    "extend": ["[1].extend([2])"], "index": ["[1,2].index(2)", "[1].index(5)", "(4,5).index(5)", "[1,2,1].index(1, 1)"], "insert": ["[1].insert(0, 2)"], "pop": ["[1,2].pop()"], "remove": ["[1].remove(1)"],
    "reverse": ["[1,2].reverse()"], "sort": ["[2,1].sort()"],
}

DICTS = {
    "clear": ["{'a':1}.clear()"], "copy": ["{'a':1}.copy()"], "fromkeys": ["dict.fromkeys(['a'], 1)"],
    "get": ["{'a':1}.get('a')", "{'a':1}.get('b')", "{'a':1}.get('b', 2)", "messages[0].get('role')", "messages[0].get('nope')", "{'a':none}.get('a', 5)", "{1:2}.get(1)", "{'a':1}.get('b', default=2)"],
    "items": ["{'a':1,'b':2}.items()", "{'a':1}.items()|list", "{'a':1}.items()|length", "{'a':1}.items()[0]"], "keys": ["{'a':1,'b':2}.keys()", "{'a':1}.keys()|list", "'a' in {'a':1}.keys()", "{'a':1}.keys()|length", "{'a':1}.keys()[0]"],
    "pop": ["{'a':1}.pop('a')"], "popitem": ["{'a':1}.popitem()"], "setdefault": ["{'a':1}.setdefault('a', 2)"], "update": ["{'a':1}.update({'b':2})"], "values": ["{'a':1,'b':2}.values()", "{'a':1}.values()|list", "{'a':1}.values()|sum"],
}

EXPRESSIONS = [
    # printing
    "true", "false", "none", "True", "None", "1", "1.0", "1e5", "1e16", "1e15", "1e-5", "0.0001", "1.5e300", "123456789.0", "0.1+0.2", "-0.0", "1/3", "10/2", "7//2", "-7//2", "7%3", "-7%3", "7.5//2", "-7.5%2", "2**10", "2**-1", "2**0.5", "5%-3", "2**100", "10**20", "123456789012345678901234567890", "1_000", "0x1f", "0b101", "0o17", "3.14_15",
    "'a'", "['a', 1, none, true, 1.5]", "['it\\'s']", "['say \"x\"']", "['it\\'s \"x\"']", "['\\n\\t\\\\']", "['é世😀']", "['\\x00\\x7f\\u00a0\\u200b\\ud7ff']", "{'a': 1, 'b': [1]}", "{1: 2, none: 3}", "(1, 2)", "(1,)", "()", "[]", "{}", "[[1],[2]]", "[('a',1)]", "messages[0]", "nope", "nope.a", "messages[0].nope", "messages[99]", "messages[0]['nope'] ~ 'x'", "[nope]", "[messages[0].nope]", "['\\u2028']", "[1e16, 1e-5]",
    # operators
    "1 ~ 2", "'a' ~ none ~ true ~ 1.0", "'a' + 'b'", "[1] + [2]", "(1,) + (2,)", "'ab' * 3", "3 * 'ab'", "[1] * 2", "2 * [0]", "'a' + 1", "1 + '1'", "none + 1", "true + 1", "true + true", "-true", "+5", "--5", "- 'a'", "1 + 1.5", "'%s-%d' % ('a', 3)", "'%s' % 'x'", "'%s' % 5", "'%d%%' % 50", "'%s %s' % (1,)", "'%(a)s' % {'a': 1}", "'a %s' % [1,2]", "'%.2f' % 2.5", "'%s' % none", "'x' % ()", "'x' % 5",
    "1 < 2 < 3", "1 < 3 < 2", "3 > 2 > 1", "1 == 1.0", "true == 1", "'1' == 1", "none == none", "[1,2] == [1,2]", "[1] == (1,)", "{'a':1} == {'a':1.0}", "'a' < 'b'", "'a' < 1", "[1,2] < [1,3]", "1 != 1.0", "nope == nope", "nope == none", "none < 1",
    "1 in [1]", "'a' in 'abc'", "'' in 'abc'", "1 in 'abc'", "'a' not in 'b'", "'k' in {'k': 1}", "nope in [1]", "1 in nope", "1 in 5", "none in [none]", "1.0 in [1]", "'role' in messages[0]", "[1] in [[1]]", "true in [1]",
    "not 1", "not ''", "not none", "1 and 2", "0 and 2", "1 or 2", "'' or 'x'", "none or [] or 0", "not 1 == 2", "1 if true", "1 if false", "1 if false else 2", "'a' if nope else 'b'", "'a' if [] else 'b'", "'a' if 0.0 else 'b'", "(1 if false) is undefined", "not not 1", "1 if 1 else 2 if 2 else 3",
    # access
    "messages[0].role", "messages[0]['role']", "messages[-1].role", "messages[1:]|length", "messages[:-1]|length", "messages[::-1]|map(attribute='role')|list", "[1,2,3,4][1:3]", "[1,2,3,4][::2]", "'héllo'[1]", "'hello'[1:3]", "'hello'[-2:]", "'hello'[::-1]", "'abc'[5:]", "'abc'[9] is undefined", "(1,2,3)[1:]", "[1,2,3][-5:2]", "[1,2,3][5]", "none[0] is undefined", "nope[0]", "nope.a.b", "messages[0].role.x", "messages.0.role", "{'a':{'b':1}}.a.b", "{'a':1}['b'] is defined", "{'items': 5}.items", "{'keys': 5}['keys']", "messages[0]['ro' ~ 'le']", "[1,2,3][1.0]", "messages['0']", "'abc'['x']", "'abc'.x", "[1,2].x", "5 .x", "[1,2,3][true]", "messages[0][none]", "[0,1,2,3,4,5][-2:0:-2]", "'abc'[none:2]", "[1,2,3][::0]", "messages[0].role.upper()", "{'a': 1}.a", "{1: 'x'}[1]", "{'1': 'x'}[1]", "{1: 'x'}[1.0]", "{true: 'x'}[1]",
    # literals
    "'\\u00e9\\x41\\101\\t|'", "\"a\\\"b\"", "'a\\'b'", "'a\\/b'", "'\\d \\. \\- \\e'", "'\\\\n'", "'\\a\\b\\f\\v'|length", "'\\0'|length", "'\\N{BULLET}'", "'\\U0001F600'", "'a' 'b'", "'a\\\nb'", "'\\ud83d\\ude00'", "'\\ud83d'|tojson(ensure_ascii=true)", "'\\x'", "'\\u12'", "'\\1234'", "'multi\nline'", "[1,2,]", "{'a':1,}", "(1,2,)", "1,2", "{'a': 1, 'a': 2}", "{a: 1}", "{'x': nope}", "1.", ".5", "1.5.2", "1e5", "1E5", "1e+2", "'é' 'è'", "1__0", "01", "00", "0_1",
    # tests and filters in expressions
    "5 is not none and true", "not 5 is none", "5 is none or true", "1 is odd is true", "'a'|upper|lower", "'a'|upper ~ 'b'", "-1|abs", "(-1)|abs", "2 + 3|string|length", "'a' is in ['a'] and true", "1 == 1 is true", "not nope", "nope or 'x'", "nope is defined and nope.x", "messages is iterable and messages is not string and messages is not mapping", "'a'|nope", "1 is nope", "nope()", "messages()", "'x'.nope()", "(1).x", "[1,2]|first + 1", "'%s' % 'a'|upper", "loop is defined", "self is defined", "caller is defined", "varargs is defined", "context is defined",
    "''.join(['a', 'b'])", "'a'.upper", "messages[0].items", "range", "messages[0].items()|list|length", "messages|length", "(messages|last).role", "messages|map(attribute='content')|map('trim')|list", "add_generation_prompt", "tools", "documents", "bos_token ~ eos_token", "pad_token", "messages[3].content", "messages[3]", "messages[3].content|tojson", "messages[3].content.strip()", "messages[3].content.splitlines()",
    "true|string", "none|string|length", "1 is sameas 1", "[1,2,3]|select('in', [1,2])|list", "{'a':1}|length", "{'a':1}|list", "{'a':1}|first", "dict(a=1)|tojson", "{**{'a':1}}", "[*[1]]", "range(*[3])|list", "dict(**{'a':1})", "'{}'.format(*[1])", "'a'.__class__", "messages.__len__()", "''['__class__']", "'a'|attr('__class__')", "lambda x: x", "[x for x in [1]]", "1 if 2", "x := 1", "`a`", "a!b", "'a'.format", "5 // 0", "5 % 0", "5 / 0", "1.5 // 0", "0 ** -1", "'a' < nope", "nope + 1", "nope ~ 'x'", "-nope", "nope < 1", "nope|upper", "nope.upper()", "none.upper()", "none|upper", "none|trim",
    "-2 ** 2", "(-2) ** 2", "-2 ** (messages|length)", "-2.5 ** 2", "2 ** -1", "1 and none", "'' and nope", "[] or {}", "7 // 2.0", "7 / 7", "1e3", "1e22", "1e23", "123456.789e3", "5e-324", "1.7976931348623157e308", "1e309", "-1e309", "0.1", "100.0", "1e2", "2.50", "1/0.1",
]

STATEMENTS = [
    # whitespace control
    "a\n", "a\n\n", "a\r\n", "a\r", "\n", "", "a\n\r", "a\n{% if true %}\nb\n{% endif %}\nc\n", "  {% if true %}\n  b\n  {% endif %}\n", "x {% if true %} y {% endif %} z", "{%- if true -%}\n a \n{%- endif -%}\n b", "a {{- 1 -}} b", "a {{ 1 }}\nb", "a\n  {{ 1 }}\nb", "{# c #}\na", "  {# c #}\na", "a {#- c -#} b", "a\n  {#- c #}\nb", "{%+ if true %}x{%+ endif %}", "  {%+ if true %}x{% endif %}", "{% if true +%}\nx{% endif %}", "\t{% if true %}\tx{% endif %}", "a\n\n  {% if true %}x{% endif %}", "a{% if true %}\n\nb{% endif %}", "{% if true %}\r\nb{% endif %}\r\nc\r\n", "{% if true %}\rb\r{% endif %}\rc\r", "a\r\n  {%- if true %}\r\nb\r\n{%- endif %}", "'{{ 'a\r\nb' }}'", "{{ 'a\rb' }}", "{{ 'a\\r\\nb' }}", "{# a\r\n #}\r\nb", "{% raw %}\r\na\r{% endraw %}", "a\n \n{% if true %}b{% endif %}\n \n", "{{ 1 }}\n", "{{ 1 }}\n\n", "{% if true %}\n{% endif %}\n", "{{ 1 }} \n{{ 2 }}", "{{- 1 }}\n{{ 2 -}}\n", "  {{- 1 }}", "\x0b{% if true %}x{% endif %}", "\u00a0{% if true %}x{% endif %}", "a\u2028  {% if true %}x{% endif %}", "a\u2028{%- if true %}x{% endif %}", "x\u00a0{{- 1 }}", "x\x1c{{- 1 }}", "a\x0c\n{% if true %}\nb{% endif %}", "a\n\u00a0\n{%- if true %}b{%- endif %}", "line\n{% for m in messages %}\n  {{ m.role }}\n{% endfor %}\nend\n",
    # raw and comments
    "{% raw %}{{ x }}{% endraw %}", "{% raw -%}\n x {%- endraw %}", "a {%- raw %} b {% endraw -%} c", "{% raw %}\n{% if %}\n{% endraw %}\nx", "{#", "{# a {# b #} c #}", "{# {{ x }} #}y", "{{ '{{' }}", "{{ '{% generation %}' }}", "{{ '#}' }}", "{% set x = '%}' %}{{ x }}", "{{ {'a': {'b': 1}}['a'] }}", "{{ {} }}", "{{{'a':1}}}", "{{", "{{ 1 }", "{%", "{% if %}", "{% endif %}", "{% if true %}", "{{ }}", "%} #} }}", "{ { 1 } }", "{%raw%}{{x}}{%endraw%}", "{%-raw-%} x {%-endraw-%} y",
    # if, for
    "{% if 0 %}a{% elif 1 %}b{% else %}c{% endif %}", "{% if nope %}a{% else %}b{% endif %}", "{% if messages[0].role == 'system' %}s{% endif %}", "{% for x in [] %}a{% else %}b{% endfor %}", "{% for x in nope %}a{% else %}b{% endfor %}", "{% for x in none %}a{% endfor %}", "{% for x in 5 %}a{% endfor %}", "{% for c in 'abc' %}{{ c }},{% endfor %}", "{% for k in {'a':1,'b':2} %}{{ k }}{% endfor %}", "{% for k, v in {'a':1}.items() %}{{ k }}={{ v }}{% endfor %}", "{% for k, v in {'a':1}|items %}{{ k }}={{ v }}{% endfor %}", "{% for a, b in [[1,2],(3,4)] %}{{ a }}{{ b }};{% endfor %}", "{% for a, b in [[1,2,3]] %}{{ a }}{% endfor %}", "{% for a in [1,2,3] if a is odd %}{{ a }}{{ loop.index }}/{{ loop.length }} {% endfor %}", "{% for m in messages if m.role == 'user' %}{{ loop.first }}{{ loop.last }}{% endfor %}", "{% for (a, (b, c)) in [(1, (2, 3))] %}{{ a }}{{ b }}{{ c }}{% endfor %}", "{% for x in [1,2,3] %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }} {% endfor %}", "{% for x in [1,2,3] %}{{ loop.previtem }}|{{ loop.nextitem }};{% endfor %}", "{% for x in [1,2] %}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}{% endfor %}", "{% for x in [1,1,2] %}{{ loop.changed(x) }}{% endfor %}", "{% for x in [1,2,3] %}{{ loop.cycle('a','b') }}{% endfor %}", "{% for x in [1,2,3,4] %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}", "{% for x in [[1,[2]],[3]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}", "{% for x in [1,2] %}{% set y = x %}{% endfor %}{{ y is defined }}", "{% set y = 0 %}{% for x in [1,2] %}{% set y = y + x %}{{ y }}{% endfor %}{{ y }}", "{% for x in [1] %}{{ loop }}{% endfor %}", "{% for i in range(3) %}{% for j in range(2) %}{{ loop.index }}{{ i }}{{ j }} {% endfor %}{% endfor %}", "{% for x in [3,1]|sort %}{{ x }}{% endfor %}", "{% for x in messages|reverse %}{{ x.role }}{% endfor %}", "{% for x in (1,2) %}{{ x }}{% endfor %}", "{% for x in 1,2 %}{{ x }}{% endfor %}", "{% for a,b in 'ab','cd' %}{{ b }}{% endfor %}", "{% for m in messages[1:] %}{{ m.role[0] }}{% endfor %}", "{{ x }}{% for x in [1] %}{{ x }}{% endfor %}{{ x }}", "{% set x = 5 %}{% for x in [1] %}{% endfor %}{{ x }}", "{% for x in [1,2] %}{{ loop.index }}{% if not loop.last %},{% endif %}{% endfor %}", "{% for x in range(3) %}{{ x }}{% break %}{% endfor %}", "{% break %}", "{% for _ in [1] %}{{ _ }}{% endfor %}", "{% for x in {'b':1,'a':2}|dictsort %}{{ x[0] }}{% endfor %}", "{% for a in [1] %}{% else %}{% endfor %}x", "{% for x in [1,2,3] %}{% if loop.index is divisibleby 2 %}{{ x }}{% endif %}{% endfor %}", "{% for x in [1] -%}  a  {%- endfor %}", "{% for x in 'héé' %}{{ loop.revindex }}{% endfor %}", "{% for x in [1,2] %}{{ loop['index'] }}{% endfor %}", "{% for x in [1] %}{{ loop.nope }}{% endfor %}", "{% for m in messages if m.nope %}{% else %}none{% endfor %}", "{% for x in [1,2] if x > 1 else [] %}{{ x }}{% endfor %}",
    # set, namespace, macros, blocks
    "{% set x = 1 %}{{ x }}", "{% set x, y = 1, 2 %}{{ x }}{{ y }}", "{% set (x, y) = [1, 2] %}{{ y }}", "{% set x %}a{{ 1 }}b{% endset %}{{ x }}|{{ x|length }}", "{% set x | upper %}abc{% endset %}{{ x }}", "{% set x %}\nab\n{% endset %}[{{ x }}]", "{% set ns = namespace(a=1) %}{% for i in [1,2] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}", "{% set ns = namespace() %}{% set ns.x = 'q' %}{{ ns.x }}", "{% set ns = namespace(_x=1) %}{{ ns._x }}", "{% set d = {} %}{% set d.a = 1 %}{{ d }}", "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}", "{% if true %}{% set z = 3 %}{% endif %}{{ z }}", "{% set messages = messages[1:] %}{{ messages|length }}", "{% set x = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ x }}", "{% set a = b = 1 %}", "{% set x = [] %}{% set _ = x.append(1) %}{{ x }}", "{% set x = {'a':1} %}{% do x.update({'b':2}) %}", "{% macro m(a, b=2) %}{{ a }}-{{ b }}{% endmacro %}{{ m(1) }} {{ m(1, 3) }} {{ m(b=5, a=4) }}", "{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m() }}{{ m(1, 2) }}", "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }}", "{% macro m(a) %}{{ a is defined }}{% endmacro %}{{ m() }}", "{% macro m() %}\n  x\n{% endmacro %}[{{ m() }}]", "{% macro m() %}({{ caller() }}){% endmacro %}{% call m() %}in{% endcall %}", "{% macro m() %}{{ caller(1) }}{% endmacro %}{% call(x) m() %}<{{ x }}>{% endcall %}", "{% macro m(x) %}{% if x > 0 %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3) }}", "{% macro m(a, b=a) %}{{ b }}{% endmacro %}{{ m(1) }}", "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}B{% endmacro %}{{ a() }}", "{% set y = 1 %}{% macro m() %}{{ y }}{% endmacro %}{{ m() }}", "{% for i in [1,2] %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}", "{{ m() }}{% macro m() %}x{% endmacro %}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m('<')|length }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m('<') ~ '<' }}{{ m }}", "{% macro m() %}{% endmacro %}{{ m.name }}", "{% macro m(a, b) %}{% endmacro %}{{ m.arguments }}", "{% filter upper %}abc{% endfilter %}", "{% filter replace('a','b') %}aa{% endfilter %}", "{% with a=1, b=2 %}{{ a }}{{ b }}{% endwith %}{{ a is defined }}", "{% with %}{% set x = 1 %}{{ x }}{% endwith %}{{ x is defined }}", "{% block b %}x{% endblock %}", "{% block b %}x{% endblock b %}", "{% extends 'x' %}", "{% include 'x' %}", "{% import 'x' as y %}", "{% from 'x' import y %}", "{% include 'x' ignore missing %}", "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{% autoescape false %}{{ '<' }}{% endautoescape %}", "{% do 1 %}", "{% trans %}a{% endtrans %}", "{% debug %}", "{% nope %}", "{% set x = 1 -%}\n  {{ x }}", "{% set j = joiner(', ') %}{% for x in [1,2,3] %}{{ j() }}{{ x }}{% endfor %}", "{% set c = cycler('a','b') %}{% for x in [1,2,3] %}{{ c.next() }}{% endfor %}{{ c.current }}", "{% set c = cycler('a','b') %}{{ c.next() }}{{ c.reset() }}{{ c.next() }}",
    # generation marks
    "{% print 1, 'a' %}", "{% generation %}x{% endgeneration %}", "{%generation%}x{%endgeneration%}", "{%-  generation  %}x{%-  endgeneration  %}", "a {%- generation -%} x {%- endgeneration -%} b", "{% generation %}\nx\n{% endgeneration %}\ny", "  {% generation %}\n  x\n  {% endgeneration %}\n", "{{ 'use {% generation %} here' }}", "{# {% generation %} #}x", "{% raw %}{% generation %}{% endraw %}", "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}", "{% generation %}{% set x = 1 %}{% endgeneration %}{{ x is defined }}", "{% set generation = 1 %}{{ generation }}", "{{ generation is defined }}", "{%+ generation %}x{%+ endgeneration %}", "{% generation +%}\nx{% endgeneration %}", "{% generation %}x", "{% endgeneration %}", "{% generation x %}{% endgeneration %}", "{% set ns = namespace(a=0) %}{% generation %}{% set ns.a = 1 %}{% endgeneration %}{{ ns.a }}", "{% generation %}{{ ('<'|escape) ~ '<' }}{% endgeneration %}", "{% for x in [1,2] %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}", "{%\ngeneration\n%}x{%\tendgeneration\t%}", "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}", "{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ m() }}", "{{ '%}' }}{% generation %}{{ '{%' }}{% endgeneration %}", "{% for x in [1,2] %}{% generation %}{% break %}{% endgeneration %}{% endfor %}", "{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}",
    # generators
    "{% set g = [1,2,3]|map('string') %}{{ g|first }}{{ g|list }}{{ g|list }}", "{% set g = [1,2,3]|select %}{{ 2 in g }}{{ g|list }}", "{% set g = [1,2]|map('string') %}{% set h = g|map('upper') %}{{ g|list }}{{ h|list }}", "{% set g = [1,2]|map('string') %}{% set h = g|map('upper') %}{{ h|list }}{{ g|list }}", "{% set g = messages|selectattr('role', 'eq', 'user') %}{% for m in g %}{{ m.role }}{% endfor %}{{ g|list|length }}", "{% set g = [1]|map('nope') %}x", "{% if messages|selectattr('role', 'eq', 'nobody') %}yes{% endif %}", "{% set g = [1,2,3]|map('string') %}{% for x in g %}{{ x }}{% break %}{% endfor %}", "{{ ([1,2]|map('string'))|length }}", "{{ [1,2]|reverse|first }}", "{% set a, b = [1,2]|map('string') %}{{ a }}{{ b }}",
    # scopes
    "{% for x in [1] %}{% block b %}{{ x }}{% endblock %}{% endfor %}",
    "{% set x %}{% set y = 1 %}{% endset %}{{ y }}",
    "{% filter upper %}{% set y = 'a' %}{{ y }}{% endfilter %}{{ y }}",
    "{% with %}{% set y = 1 %}{% endwith %}{{ y }}",
    "{% with a=1, b=a %}{{ b }}{% endwith %}",
    "{% set a = 1 %}{% with a=2, b=a %}{{ b }}{% endwith %}",
    "{% macro m() %}{% set y = 1 %}{% endmacro %}{{ m() }}{{ y }}",
    "{% set y = 0 %}{% macro m() %}{{ y }}{% set y = 1 %}{{ y }}{% endmacro %}{{ m() }}{{ y }}",
    "{% set y = 0 %}{% for i in [1,2] %}{{ y }}{% set y = i %}{{ y }}{% endfor %}{{ y }}",
    "{% for i in [1,2] %}{% if i == 1 %}{% set y = i %}{% endif %}{{ y }}{% endfor %}",
    "{% set y = 5 %}{% for i in [1,2] %}{% if i == 1 %}{% set y = i %}{% endif %}{{ y }}{% endfor %}",
    "{% macro m() %}{{ caller() }}{{ y }}{% endmacro %}{% set y = 1 %}{% call m() %}{% set y = 2 %}{{ y }}{% endcall %}{{ y }}",
    "{% for i in [1] %}{% for j in [2] %}{{ loop.index }}{{ i }}{% endfor %}{{ loop.index }}{% else %}{% endfor %}{{ loop is defined }}",
    "{% for i in [] %}{% else %}{% set q = 1 %}{{ q }}{{ loop is defined }}{% endfor %}{{ q }}",
    "{% for i in [1,2,3] if loop is defined %}{{ i }}{% endfor %}",
    "{% for i in [1] %}{% for j in [1,2] if loop.index == 1 %}{{ j }}{% endfor %}{% endfor %}",
    "{% for i in [1,2,3] if i > loop.index %}{{ i }}{% endfor %}",
    "{% set x = 1 %}{% macro m(x=x) %}{{ x }}{% endmacro %}{{ m() }}",
    "{% set a = 1 %}{% macro m(a, b=a) %}{{ b }}{% endmacro %}{{ m() }}",
    "{% macro m(a=1, b=c) %}{{ b }}{% endmacro %}{% set c = 4 %}{{ m() }}",
    "{{ m is defined }}{% macro m() %}{% endmacro %}{{ m is defined }}",
    "{% if false %}{% macro m() %}x{% endmacro %}{% endif %}{{ m is defined }}",
    "{% if true %}{% macro m() %}x{% endmacro %}{% endif %}{{ m() }}",
    "{% set messages = [] %}{% macro m() %}{{ messages|length }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ messages|length }}{% endmacro %}{% set messages = [] %}{{ m() }}",
    "{% set range = 5 %}{{ range }}",
    "{% for range in [1] %}{{ range }}{% endfor %}{{ range(2)|list }}",
    "{% set a, b = 'xy' %}{{ a }}{{ b }}",
    "{% set (a, (b, c)) = (1, (2, 3)) %}{{ c }}",
    "{% set ns = namespace(a=1) %}{% set ns.a, b = 2, 3 %}{{ ns.a }}{{ b }}",
    "{% for ns_a in [1] %}{% endfor %}{{ ns_a is defined }}",
    "{% set x = namespace(l=[]) %}{% set x.l = x.l + [1] %}{{ x.l }}",
    "{{ x }}{% set x = 1 %}{{ x }}",
    "{% set loop = 5 %}{% for i in [1] %}{{ loop.index }}{% endfor %}{{ loop }}",
    "{% for loop in [1] %}{{ loop }}{% endfor %}",
    "{% for i in [1] %}{% set loop = 7 %}{{ loop }}{% endfor %}",
    "{% macro outer() %}{% macro inner() %}i{% endmacro %}{{ inner() }}{% endmacro %}{{ outer() }}",
    "{% for x in [[1,[2,[3]]]] recursive %}{{ loop.depth }}{% for y in x %}{% if y is iterable %}{{ loop.index }}{% endif %}{% endfor %}{% endfor %}",
    "{% for x in [[1],[2]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ loop.depth0 }}{{ x }}{% endif %}{% endfor %}",
    "{% generation %}{% set a = 1 %}{{ a }}{% endgeneration %}{{ a }}",
    "{% for x in [1] %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
    "{% call(a, b=2) m() %}{{ a }}{{ b }}{% endcall %}{% macro m() %}{{ caller(1) }}{% endmacro %}",
    "{% macro m() %}{{ caller(1) }}{% endmacro %}{% call(a, b=2) m() %}{{ a }}{{ b }}{% endcall %}",
    "{% macro m() %}{{ caller is defined }}{% if caller %}{{ caller() }}{% endif %}{% endmacro %}{{ m() }}{% call m() %}c{% endcall %}",
    "{% macro m(caller) %}{{ caller }}{% endmacro %}{{ m(1) }}",
    "{{ loop.index }}",
    "{% for a in messages %}{{ loop.index if loop.first }}{% endfor %}",
    "{% if messages[0].role == 'system' -%}\n{{ x }}\n{%- endif %}",
    "{% set x = 'a' if false %}{{ x }}{{ x is defined }}",
    "{{ ('a' if false) ~ 'b' }}{{ ('a' if false)|default('d') }}",
    "{{ messages|map(attribute='role')|unique|list }}{{ messages|groupby('role')|list|length }}",
    "{{ [3,1,2]|sort|first }}{{ 'a,b'.split(',')|last }}{{ ('x' * 3).upper() }}",
    "{{ {'a':1}.items()|list|first|last }}{{ dict(a=1, **{'b':2}) }}",
    "{{ 1 if messages else 2 }}{{ messages and 'x' }}{{ (messages or 1)|length }}",
    "{{ '%s' % messages[0].role }}{{ 'x: %s' % ('y',) }}{{ '%d items' % messages|length }}",
    "{{ '\t\\t\u0007' }}",
    "{{ \"a\nb\" }}",
    "{{ 'a' ~\n 'b' }}",
    "{{\n1\n}}",
    "{%\nif true\n%}x{%\nendif\n%}",
    "{% for x in [1] %}{% continue %}{% else %}e{% endfor %}", "{% for x in [1,2] %}{% break %}{% else %}e{% endfor %}", "{% for x in [1,2] %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% else %}e{% endfor %}", "{% macro m(x) %}{{ x }}{{ kwargs }}{% endmacro %}{{ m(1, x=2) }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(1, x=2) }}", "{% macro m() %}{{ caller }}{{ caller.name }}{% endmacro %}{% call m() %}{% endcall %}", "{% generation %}{{ varargs }}{{ kwargs }}{{ caller is defined }}{% endgeneration %}", "{{ dict(a=1, a=2) }}",
    # templates of the field, in short
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}",
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if message['role'] == 'user' %}\n        {{- '[INST] ' + message['content']|trim + ' [/INST]' }}\n    {%- elif message['role'] == 'assistant' %}\n        {{- ' ' + message['content']|trim + eos_token }}\n    {%- else %}\n        {{- raise_exception('Only user and assistant roles are supported!') }}\n    {%- endif %}\n{%- endfor %}\n",
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n{{ ns.last_query_index }}",
    "{%- if tools is not none %}{{ tools|tojson }}{% endif %}{%- for m in messages %}{{ '<|' ~ m.role ~ '|>' }}{{ m.content | trim }}{% endfor %}",
    "{% for message in messages %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ content }}{% endfor %}",
    "{{ messages|selectattr('role', 'equalto', 'system')|map(attribute='content')|join('\n') }}{% for m in messages|rejectattr('role', 'equalto', 'system') %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
    "{% for m in messages %}\n<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}\n<|assistant|>\n",
]

FORMATS = ["%Y-%m-%d", "%d %b %Y", "%A, %B %d, %Y", "%H:%M:%S", "%I:%M %p", "%f", "%j %U %W %u %w", "%y", "%Z|%z|", "%c", "%x", "%X", "%D", "%F", "%T", "%R", "%e", "%h", "%n%t|", "%C", "%G-%V", "%g", "%s", "%-d/%-m", "%_d", "%^a", "%#Z", "%k", "%l", "%P", "%r", "100%", "%%", "%", "%Q", "%E", "%Ey", "%Od", "%5Y", "%010d", "é %Y", "", "%+", "%v", "%L", "%N", "%i", "%-I%p", "%:z", "%::z", "a%", "%-", "%3f", "%.3f", "%-H", "%-j", "%-y", "%0d", "%_H", "%^B", "%#B", "%^b"]


def cases():
    for kind, table in (("filter", FILTERS), ("test", TESTS), ("global", GLOBALS), ("string", STRINGS), ("list", LISTS), ("dict", DICTS)):
        for name, expressions in table.items():
            for template in printed(*expressions):
                yield f"{kind} {name}", template
    for template in printed(*EXPRESSIONS):
        yield "expression", template
    for template in STATEMENTS:
        yield "statement", template


def strftime(format):
    try:
        return NOW.strftime(format)
    except Exception:
        return None


def main():
    env = environment()
    missing = (set(env.filters) - set(FILTERS)) | (set(env.tests) - set(TESTS)) | (set(env.globals) - set(GLOBALS))
    for type_, table in ((str, STRINGS), (list, LISTS), (dict, DICTS)):
        missing |= {name for name in dir(type_) if not name.startswith("_")} - set(table)
    assert not missing, f"no cases for {missing}"
    document = {
        "jinja": jinja2.__version__,
        "messages": MESSAGES,
        "special": SPECIAL,
        "cases": [[name, template, render(template)] for name, template in cases()],
        "now": NOW.isoformat(),
        "strftime": [[format, strftime(format)] for format in FORMATS],
    }
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "fixtures", "jinja", "cases.json")
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, ensure_ascii=True, indent=0)
        file.write("\n")
    refused = sum(1 for case in document["cases"] if case[2] is None)
    print(f"{len(document['cases'])} cases, {refused} refused by Jinja")


if __name__ == "__main__":
    main()
