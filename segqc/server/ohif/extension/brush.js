/**
 * Whole circles for brush and eraser, on every slice.
 *
 * Cornerstone's own are measured along the axes of the world: on a slice that lies across them the circle of OHIF 3.10
 * misses most of its pixels, and 3.13 leaves holes between two places that the mouse tells of. 3.10 does not paint where
 * the button goes down, either, 3.13 not where there is a click after a stroke, and both nothing where a circle holds no
 * pixel's centre.
 */
import { toPixel } from './ohif.js';

const CIRCLES = { CircularBrush: 'FILL_INSIDE_CIRCLE', CircularEraser: 'ERASE_INSIDE_CIRCLE' };

/** @typedef {[number, number, number]} Point LPS millimetres */

/** Tools that have our circle. @type {WeakSet<any>} */
const mended = new WeakSet();

/**
 * Give the tools of all groups our circle.
 *
 * @param {any} services OHIF's
 */
export function mendBrushes(services) {
  const { toolGroupService } = services;
  for (const id of toolGroupService.getToolGroupIds()) {
    for (const [name, circle] of Object.entries(CIRCLES)) {
      const tool = toolGroupService.getToolGroup(id)?.getToolInstance(name);
      const strategies = tool?.configuration?.strategies;
      if (strategies?.[circle] && !mended.has(tool)) {
        mended.add(tool);
        tool.configuration.strategies = { ...strategies, [circle]: sweep(strategies[circle]) };
      }
    }
  }
}

/**
 * What a tool does with a circle, done with all pixels between where the mouse is and where it was last.
 *
 * @param {any} own the tool's; as it is where no stored slice is shown
 */
function sweep(own) {
  /** where the mouse was last in this stroke @type {Point | null} */
  let last = null;

  /**
   * @param {any} enabledElement Cornerstone's
   * @param {any} stroke what the tool knows of it
   * @returns {any}
   */
  function paint(enabledElement, stroke) {
    const voxels = stroke.imageId && window.cornerstone.cache.getImage(stroke.imageId)?.voxelManager;
    if (!stroke.points || !voxels) {
      return own(enabledElement, stroke);
    }
    const now = centre(stroke.points);
    const radius = distance(stroke.points[0], stroke.points[1]) / 2;
    const pixels = pixelsNear(enabledElement.viewport.getCurrentImageId(), last ?? now, now, radius);
    last = now;
    const { forEach } = voxels; // by which the tool finds the pixels of its circle
    voxels.forEach = (/** @type {(pixel: { value: number, index: number }) => void} */ visit) => {
      for (const index of pixels) {
        visit({ value: voxels.getAtIndex(index), index });
      }
    };
    try {
      own(enabledElement, stroke); // without its answer: a preview to 3.13's tool, which paints by no click as long
    } finally {
      voxels.forEach = forEach;
    }
  }

  return Object.assign(paint, own, {
    /**
     * @param {any} enabledElement
     * @param {any} stroke
     */
    onInteractionStart(enabledElement, stroke) {
      last = stroke.points ? centre(stroke.points) : null;
      return own.onInteractionStart?.(enabledElement, stroke);
    },
  });
}

/**
 * The pixels of a slice that a line goes through, or that are no further than a radius from it.
 *
 * @param {string} imageId
 * @param {Point} start
 * @param {Point} end
 * @param {number} radius in millimetres
 * @returns {Iterable<number>} places in the slice's array
 */
function* pixelsNear(imageId, start, end, radius) {
  const { rows, columns, columnPixelSpacing: width, rowPixelSpacing: height } =
    window.cornerstone.metaData.get('imagePlaneModule', imageId);
  const [[x0, y0], [x1, y1]] = [start, end].map(point => {
    const [column, row] = toPixel(imageId, point);
    return [column * width, row * height];
  });
  const [dx, dy] = [x1 - x0, y1 - y0];
  const range = (/** @type {number} */ a, /** @type {number} */ b, /** @type {number} */ size, /** @type {number} */ n) => [
    Math.max(0, Math.ceil((Math.min(a, b) - Math.max(radius, size / 2)) / size)),
    Math.min(n - 1, Math.floor((Math.max(a, b) + Math.max(radius, size / 2)) / size)),
  ];
  const [[left, right], [top, bottom]] = [range(x0, x1, width, columns), range(y0, y1, height, rows)];
  for (let row = top; row <= bottom; row += 1) {
    for (let column = left; column <= right; column += 1) {
      const [x, y] = [column * width - x0, row * height - y0];
      const share = Math.max(0, Math.min(1, (x * dx + y * dy) / (dx * dx + dy * dy || 1)));
      const isCrossed = // by the line, as no axis separates it from the pixel
        Math.abs(2 * x - dx) <= Math.abs(dx) + width &&
        Math.abs(2 * y - dy) <= Math.abs(dy) + height &&
        Math.abs(x * dy - y * dx) <= (Math.abs(dx) * height + Math.abs(dy) * width) / 2;
      if (isCrossed || Math.hypot(x - share * dx, y - share * dy) <= radius) {
        yield row * columns + column;
      }
    }
  }
}

/** @param {Point[]} points of a circle: bottom and top, left and right @returns {Point} */
function centre(points) {
  return /** @type {Point} */ ([0, 1, 2].map(i => (points[0][i] + points[1][i]) / 2));
}

/**
 * @param {Point} one
 * @param {Point} other
 */
function distance(one, other) {
  return Math.hypot(...one.map((value, i) => value - other[i]));
}
