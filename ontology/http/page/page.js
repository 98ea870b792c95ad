// The query page: YASGUI on this server's endpoint, with the fleet's query library beside it.
const { Yasgui } = window;
const { Yasqe, Yasr } = Yasgui;

/** A typed value as a SPARQL term: an IRI, a number, true or false, or else a text. */
function term(typed) {
  if (/^<[^<>\s]*>$/.test(typed) || /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(typed) || /^(true|false)$/.test(typed)) {
    return typed;
  }
  return /^(urn:|https?:\/\/)[^<>"{}|\\^`\s]*$/.test(typed) ? `<${typed}>` : JSON.stringify(typed);
}

/** The query with a parameter set, or unset where nothing was typed. */
function bound(query, name, typed) {
  const values = new RegExp(`VALUES\\s*[?$]${name}\\s*\\{[^{}]*\\}`, "i");
  return query.replace(values, () => `VALUES ?${name} { ${typed === "" ? "UNDEF" : term(typed)} }`);
}

/** An element with these properties and children. */
function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Completes from a fixed list, where YASQE would ask a server on the Internet. */
function completer(like, name, list) {
  Yasqe.forkAutocompleter(like, { name, bulk: true, persistenceId: null, get: () => Promise.resolve(list) }, false);
  return name;
}

/** Shows numbers, times and booleans without the data types that YASR adds. */
function showPlainly() {
  const table = Yasr.plugins.table.prototype;
  const { formatLiteral } = table;
  const plain = /^http:\/\/www\.w3\.org\/2001\/XMLSchema#(boolean|decimal|double|float|\w*[iI]nt(eger)?|\w*[lL]ong|dateTime|date)$/;
  table.formatLiteral = function (literal, prefixes) {
    const { datatype, ...rest } = literal;
    return formatLiteral.call(this, plain.test(datatype) ? rest : literal, prefixes);
  };
}

function firstQuery({ prefixes }) {
  return `# The devices of the fleet, as they describe themselves.
PREFIX tf: <${prefixes.tf}>
PREFIX td: <${prefixes.td}>

SELECT ?id ?title ?board ?engine ?version ?online WHERE {
  ?device a tf:Device ;
          tf:deviceId ?id ;
          td:title ?title ;
          tf:board/td:title ?board ;
          tf:engine ?engine ;
          tf:engineVersion ?version .
  OPTIONAL { ?device tf:online ?online }
}
ORDER BY ?id
LIMIT 100`;
}

function start(about) {
  if (about.fleet) {
    document.title = `TinyFleet: query the fleet ${about.fleet}`;
    document.getElementById("fleet").textContent = `fleet ${about.fleet}`;
  }
  const prefixes = Object.entries(about.prefixes).map(([prefix, iri]) => `${prefix}: <${iri}>`);
  Yasqe.defaults.value = firstQuery(about);
  Yasqe.defaults.prefixCcApi = null;
  Yasqe.defaults.autocompleters = [
    completer("prefixes", "fleet-prefixes", prefixes),
    completer("class", "fleet-classes", about.classes),
    completer("property", "fleet-properties", about.properties),
    "variables",
  ];
  showPlainly();
  const yasgui = new Yasgui(document.getElementById("page"), {
    requestConfig: { endpoint: `${location.origin}/sparql`, headers: { "X-CSRF-Token": about.csrf ?? "" } },
    copyEndpointOnNewTab: false,
    endpointCatalogueOptions: { getData: () => [], keys: [], renderItem: () => {} },
    yasr: { prefixes: about.prefixes },
  });

  const items = new Map();
  const queries = new Map(about.queries.map((query) => [query.name, query]));

  function show(tab) {
    const name = tab && tab.getName();
    for (const [of, item] of items) item.classList.toggle("chosen", of === name);
  }

  function open(query) {
    const there = Object.values(yasgui._tabs).find((tab) => tab.getName() === query.name);
    if (there) yasgui.selectTabId(there.getId());
    else yasgui.addTab(true, { ...Yasgui.Tab.getDefaults(yasgui), name: query.name, yasqe: { value: query.text } });
    show(yasgui.getTab());
  }

  for (const query of queries.values()) {
    const form = element("form", {});
    for (const parameter of query.parameters) {
      const field = element("input", { name: parameter.name, placeholder: "not set", spellcheck: false });
      field.addEventListener("input", () => {
        open(query);
        const tab = yasgui.getTab();
        tab.setQuery(bound(tab.getQuery(), parameter.name, field.value.trim()));
      });
      form.append(element("label", {}, parameter.name, field, element("small", {}, parameter.about)));
    }
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      open(query);
      yasgui.getTab().query();
    });
    const button = element("button", { type: "button" }, element("strong", {}, query.name), element("span", {}, query.about));
    button.addEventListener("click", () => open(query));
    const item = element("li", {}, button, form);
    items.set(query.name, item);
    document.getElementById("library").append(item);
  }

  document.getElementById("search").addEventListener("input", ({ target }) => {
    const wanted = target.value.trim().toLowerCase();
    for (const [name, item] of items) {
      item.hidden = !`${name} ${queries.get(name).about}`.toLowerCase().includes(wanted);
    }
  });
  yasgui.on("tabSelect", (_, id) => show(yasgui.getTab(id)));
  show(yasgui.getTab());
}

fetch("/page/about.json").then((answer) => (answer.ok ? answer.json().then(start) : location.reload()));
