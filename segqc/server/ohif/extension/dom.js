/**
 * Elements, and words for numbers and times.
 *
 * @typedef {Node | string | null | false | undefined} Child what is nothing is left out
 */

const SVG = 'http://www.w3.org/2000/svg';

/**
 * An element.
 *
 * @param {string} name
 * @param {Record<string, any>} [attributes] a function is a listener, undefined and false are left out
 * @param {...Child} children
 * @returns {HTMLElement}
 */
export function h(name, attributes = {}, ...children) {
  return /** @type {HTMLElement} */ (fill(document.createElement(name), attributes, children));
}

/**
 * The same in SVG.
 *
 * @param {string} name
 * @param {Record<string, any>} [attributes]
 * @param {...Child} children
 * @returns {SVGElement}
 */
export function s(name, attributes = {}, ...children) {
  return /** @type {SVGElement} */ (fill(document.createElementNS(SVG, name), attributes, children));
}

/**
 * @param {Element} made
 * @param {Record<string, any>} attributes
 * @param {Child[]} children
 */
function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') {
      made.addEventListener(name, value);
    } else if (value !== undefined && value !== false) {
      made.setAttribute(name, value === true ? '' : String(value));
    }
  }
  put(made, ...children);
  return made;
}

/**
 * Put children in the place of those that an element has.
 *
 * @param {Element} element
 * @param {...Child} children
 */
export function put(element, ...children) {
  element.replaceChildren(...children.filter(child => child !== null && child !== undefined && child !== false));
}

const ICONS = {
  brush: 'M13.5 2.5 7 9M5.5 9.5c-2 0-2.5 1.5-2.5 3-.5.5-1 1-1.5 1 2 .8 6 .5 6-2 0-1-.8-2-2-2Z',
  eraser: 'M6 13.5h8M9.5 3 14 7.5l-6 6H5L2 10.5 9.5 3ZM6 6.5l4.5 4.5',
  undo: 'M5 3 2 6l3 3M2 6h7.5a4 4 0 0 1 0 8H6',
  redo: 'm11 3 3 3-3 3M14 6H6.5a4 4 0 0 0 0 8H10',
  eye: 'M1.5 8s2.5-4.5 6.5-4.5S14.5 8 14.5 8 12 12.5 8 12.5 1.5 8 1.5 8ZM8 10a2 2 0 1 0 0-4 2 2 0 0 0 0 4Z',
  hidden: 'M2 2l12 12M6.4 3.7A6 6 0 0 1 8 3.5C12 3.5 14.5 8 14.5 8a12 12 0 0 1-2 2.5M4 5a11 11 0 0 0-2.500 3S4 12.500 8 12.500a6 6 0 0 0 3-.8',
};

/** @param {keyof typeof ICONS} name */
export function icon(name) {
  return s('svg', { class: 'icon', viewBox: '0 0 16 16', 'aria-hidden': 'true' }, s('path', { d: ICONS[name] }));
}

/** @param {number | null | undefined} value a Dice */
export const dice = value => (value === null || value === undefined ? '–' : value.toFixed(2));

/** @param {number} value millilitres */
export const ml = value => `${value < 0.1 ? value.toFixed(3) : value < 10 ? value.toFixed(2) : value.toFixed(0)} ml`;

/**
 * @param {number} count
 * @param {string} what
 * @param {string} [more] of several
 */
export const plural = (count, what, more = `${what}s`) => `${count.toLocaleString('en')} ${count === 1 ? what : more}`;

/** A time of today by the clock, another with its day. @param {string} iso */
export function when(iso) {
  const time = new Date(iso);
  const clock = time.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' });
  const isToday = time.toDateString() === new Date().toDateString();
  return isToday ? clock : `${time.toLocaleDateString([], { day: 'numeric', month: 'short' })}, ${clock}`;
}
