// Elements whose text is never markup, and updates that keep focus, selection and scroll position.

const SVG = "http://www.w3.org/2000/svg";

function make(element, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element[name] = value;
    else if (name === "class") element.setAttribute("class", value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

function add(element, children) {
  for (const child of children) {
    if (child === null || child === undefined || child === false) continue;
    if (Array.isArray(child)) add(element, child);
    else element.append(child instanceof Node ? child : String(child));
  }
}

const isGiven = (first) => first !== null && typeof first === "object" && !(first instanceof Node) && !Array.isArray(first);

function maker(create) {
  return (tag, ...rest) => {
    const given = isGiven(rest[0]) ? rest.shift() : {};
    return make(create(tag), given, rest);
  };
}

/** An HTML element: `h("p", {class: "note"}, "text", child)`. Texts become text nodes, whatever they hold. */
export const h = maker((tag) => document.createElement(tag));

/** An SVG element. */
export const s = maker((tag) => document.createElementNS(SVG, tag));

/**
 * Make the children of `shown` equal to those of `wanted` with as few changes as possible, so that focus, selection,
 * scroll position and open details survive. Elements with a `data-key` are moved, not rewritten.
 */
export function morph(shown, wanted) {
  const byKey = new Map();
  for (const child of shown.children) if (child.dataset?.key) byKey.set(child.dataset.key, child);
  let place = shown.firstChild;
  for (const next of [...wanted.childNodes]) {
    const key = next.dataset?.key;
    const known = key ? byKey.get(key) : undefined;
    if (known !== undefined) {
      byKey.delete(key);
      if (known === place) place = place.nextSibling;
      else shown.insertBefore(known, place);
      become(known, next, shown);
    } else if (!key && place !== null && alike(place, next)) {
      const current = place;
      place = place.nextSibling;
      become(current, next, shown);
    } else {
      shown.insertBefore(next, place);
    }
  }
  while (place !== null) {
    const gone = place;
    place = place.nextSibling;
    gone.remove();
  }
}

const alike = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName && !a.dataset?.key;

function become(shown, wanted, parent) {
  if (shown.nodeType !== Node.ELEMENT_NODE) {
    if (shown.nodeValue !== wanted.nodeValue) shown.nodeValue = wanted.nodeValue;
    return;
  }
  if (shown.nodeName !== wanted.nodeName) {
    parent.replaceChild(wanted, shown);
    return;
  }
  for (const { name } of [...shown.attributes]) {
    // The reader opens and closes details.
    if (!wanted.hasAttribute(name) && name !== "open") shown.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (shown.getAttribute(name) === value || name === "open") continue;
    // The content security policy refuses styles that are set as text.
    if (name === "style") for (const part of wanted.style) shown.style.setProperty(part, wanted.style.getPropertyValue(part));
    else shown.setAttribute(name, value);
  }
  for (const name of ["onclick", "oninput", "onchange", "onsubmit", "onkeydown"]) {
    if (shown[name] !== wanted[name]) shown[name] = wanted[name];
  }
  if (shown.dataset.own === undefined) morph(shown, wanted);
}
