/**
 * What is drawn over the slices: boxes around likely errors, the error map as a translucent layer, and outlines of what
 * is proposed.
 *
 * It is no annotation and no segmentation of the viewer's: it cannot be painted, selected or exported by mistake.
 *
 * @typedef {import('./server.js').Scan} Scan
 * @typedef {import('./server.js').Box} Box
 * @typedef {import('./proposal.js').ProposedBox} ProposedBox
 */
import { s } from './dom.js';
import { instanceOf, isStack, toWorld, viewportsOf } from './ohif.js';

const RENDERED = 'CORNERSTONE_IMAGE_RENDERED';
const LEAST = 0.15; // less is not shown

export class Overlay {
  /**
   * @param {any} services
   * @param {Scan} scan
   */
  constructor(services, scan) {
    this.services = services;
    this.scan = scan;
    this.hasBoxes = true;
    this.opacity = 0.5;
    /** @type {Uint8Array | null} */
    this.errors = null;
    /** what is proposed and not taken @type {ProposedBox[]} */
    this.proposed = [];
    /** the one that is looked at @type {ProposedBox | null} */
    this.chosen = null;
    /** @type {Map<string, Box[]>} */
    this.boxes = new Map();
    for (const box of scan.estimate?.boxes ?? []) {
      this.boxes.set(box.instance, [...(this.boxes.get(box.instance) ?? []), box]);
    }
    this.colours = new Map(
      (scan.estimate?.structures ?? []).map(({ name, values }) => [
        name,
        scan.segments.find(segment => values.includes(segment.value))?.colour ?? '#fff',
      ])
    );
    /** @type {Map<HTMLElement, Layer>} */
    this.layers = new Map();
  }

  /** Draw in the viewports that show the scan. */
  show() {
    const now = new Map(viewportsOf(this.services, this.scan).map(({ viewport }) => [viewport.element, viewport]));
    for (const [element, layer] of this.layers) {
      if (now.get(element) !== layer.viewport) {
        layer.dispose();
        this.layers.delete(element);
      }
    }
    for (const [element, viewport] of now) {
      if (!this.layers.has(element)) {
        this.layers.set(element, new Layer(this, viewport));
      }
    }
    this.draw();
  }

  draw() {
    this.layers.forEach(layer => layer.draw());
  }

  dispose() {
    this.layers.forEach(layer => layer.dispose());
    this.layers.clear();
  }
}

class Layer {
  /**
   * @param {Overlay} overlay
   * @param {any} viewport
   */
  constructor(overlay, viewport) {
    this.overlay = overlay;
    this.viewport = viewport;
    this.shown = '';
    this.root = document.createElement('div');
    this.root.className = 'segqc-overlay';
    this.root.style.cssText = 'position: absolute; inset: 0; overflow: hidden; pointer-events: none';
    this.heat = document.createElement('canvas');
    this.heat.style.cssText = 'position: absolute; left: 0; top: 0; transform-origin: 0 0';
    this.svg = s('svg');
    this.svg.style.cssText = 'position: absolute; inset: 0; width: 100%; height: 100%';
    this.root.append(this.heat, this.svg);
    viewport.element.append(this.root);
    this.onRendered = () => this.draw();
    viewport.element.addEventListener(RENDERED, this.onRendered);
  }

  draw() {
    const imageId = isStack(this.viewport) ? this.viewport.getCurrentImageId() : undefined;
    const instance = imageId && instanceOf(imageId);
    this.root.hidden = !instance || !this.overlay.scan.instances.includes(instance);
    this.root.style.display = this.root.hidden ? 'none' : '';
    if (this.root.hidden) {
      return;
    }
    const place = this.#place(imageId);
    this.#drawHeat(instance, place);
    this.#drawBoxes(instance, place);
  }

  dispose() {
    this.viewport.element?.removeEventListener(RENDERED, this.onRendered);
    this.root.remove();
  }

  /**
   * How pixels of the slice lie on the screen: a matrix of CSS. An image's corner is half a pixel before its centre.
   *
   * @param {string} imageId
   */
  #place(imageId) {
    const at = (/** @type {number} */ column, /** @type {number} */ row) =>
      this.viewport.worldToCanvas(toWorld(imageId, column - 0.5, row - 0.5));
    const [[x, y], [right, down], [left, below]] = [at(0, 0), at(1, 0), at(0, 1)];
    return [right - x, down - y, left - x, below - y, x, y];
  }

  /**
   * @param {string} instance
   * @param {number[]} place
   */
  #drawHeat(instance, place) {
    const { errors, opacity, scan } = this.overlay;
    this.heat.hidden = !errors || opacity === 0;
    this.heat.style.display = this.heat.hidden ? 'none' : '';
    if (!errors || this.heat.hidden) {
      return;
    }
    this.heat.style.opacity = String(opacity);
    this.heat.style.transform = `matrix(${place.join(',')})`;
    if (this.shown === instance) {
      return;
    }
    this.shown = instance;
    [this.heat.width, this.heat.height] = [scan.columns, scan.rows];
    const size = scan.rows * scan.columns;
    const slice = scan.instances.indexOf(instance);
    const context = this.heat.getContext('2d');
    context?.putImageData(heatOf(errors.subarray(slice * size, (slice + 1) * size), scan.columns), 0, 0);
  }

  /**
   * What is proposed in a slice: full lines around what would be added to a structure, dotted ones around what would go.
   *
   * @param {string} instance
   * @param {number[]} place
   */
  #outlines(instance, place) {
    const { proposed, colours, chosen } = this.overlay;
    return proposed
      .filter(box => box.instance === instance)
      .flatMap(box => {
        const transform = `matrix(${place.join(',')})`;
        const line = { d: box.outline, fill: 'none', class: 'proposed', transform, 'vector-effect': 'non-scaling-stroke' };
        const dotted = box.adds * 2 < box.voxels ? '2 3' : undefined;
        const width = box === chosen ? 3 : 1.5;
        return [
          s('path', { ...line, stroke: '#000', 'stroke-width': width + 2, 'stroke-opacity': 0.6 }),
          s('path', { ...line, stroke: colours.get(box.structure) ?? '#fff', 'stroke-width': width, 'stroke-dasharray': dotted }),
        ];
      });
  }

  /**
   * @param {string} instance
   * @param {number[]} place
   */
  #drawBoxes(instance, place) {
    const boxes = this.overlay.hasBoxes ? (this.overlay.boxes.get(instance) ?? []) : [];
    this.svg.replaceChildren(
      ...this.#outlines(instance, place),
      ...boxes.flatMap(box => {
        const colour = this.overlay.colours.get(box.structure) ?? '#fff';
        const [[left, right], [top, bottom]] = [box.columns, box.rows];
        const corners = [[left, top], [right, top], [right, bottom], [left, bottom]].map(([column, row]) => [
          place[0] * column + place[2] * row + place[4],
          place[1] * column + place[3] * row + place[5],
        ]);
        const points = corners.map(corner => corner.join(',')).join(' ');
        return [
          s('polygon', { points, fill: 'none', stroke: '#000', 'stroke-width': 4, 'stroke-opacity': 0.6 }),
          s('polygon', { points, fill: 'none', stroke: colour, 'stroke-width': 2, 'stroke-dasharray': '7 4' }),
        ];
      })
    );
  }
}

/**
 * A slice of an error map as a picture: from a clear orange to a full red.
 *
 * @param {Uint8Array} levels
 * @param {number} columns
 */
function heatOf(levels, columns) {
  const picture = new ImageData(columns, levels.length / columns);
  levels.forEach((level, i) => {
    const share = Math.max(0, level / 255 - LEAST) / (1 - LEAST);
    picture.data.set([255, Math.round(170 * (1 - share)), 0, Math.round(255 * share)], 4 * i);
  });
  return picture;
}
