/**
 * What we use of OHIF and Cornerstone, in the versions that we know: 3.10 and 3.13.
 *
 * @typedef {import('./server.js').Scan} Scan
 */
const TOOLS = { brush: 'CircularBrush', eraser: 'CircularEraser' };
const WAIT_MS = 40;
const PATIENCE_MS = 120_000;
export const ROUTE = 'segqc';

/** The SOPInstanceUID of an image. @param {string} imageId */
export function instanceOf(imageId) {
  return window.cornerstone.metaData.get('instance', imageId)?.SOPInstanceUID ?? '';
}

/** What the address names: a series, or a study, which stands for its only one. */
export function scanOfAddress() {
  const parameters = new URLSearchParams(window.location.search);
  return (parameters.get('SeriesInstanceUIDs') ?? parameters.get('StudyInstanceUIDs') ?? '').split(',')[0];
}

/**
 * Have OHIF show another scan, without loading the page anew where that can be.
 *
 * @param {any} commandsManager
 * @param {Scan} scan
 */
export function goTo(commandsManager, scan) {
  const parameters = new URLSearchParams(window.location.search);
  const isOfSameStudy = parameters.get('StudyInstanceUIDs') === scan.study;
  parameters.set('StudyInstanceUIDs', scan.study);
  parameters.set('SeriesInstanceUIDs', scan.series);
  if (isOfSameStudy) {
    window.location.search = `${parameters}`; // OHIF does not look for another series of the study that it shows
    return;
  }
  const [, source = ''] = window.location.pathname.match(`/${ROUTE}(/[^/]+)?/?$`) ?? []; // a data source, if it is named
  commandsManager.runCommand('navigateHistory', { to: `/${ROUTE}${source}?${parameters}` });
}

/**
 * The viewports that show a scan, and Cornerstone's for each.
 *
 * @param {any} services
 * @param {Scan} scan
 * @returns {{ viewportId: string, viewport: any }[]}
 */
export function viewportsOf(services, scan) {
  const ids = [...services.viewportGridService.getState().viewports.keys()];
  return ids
    .map(viewportId => ({ viewportId, viewport: viewport(services, viewportId) }))
    .filter(({ viewport }) => viewport && scan.instances.includes(instanceOf(viewport.getImageIds()[0])));
}

/**
 * Cornerstone's viewport; null where it has nothing to show yet.
 *
 * @param {any} services
 * @param {string} viewportId
 */
function viewport(services, viewportId) {
  try {
    const found = services.cornerstoneViewportService.getCornerstoneViewport(viewportId);
    return found?.getImageIds().length ? found : null;
  } catch {
    return null; // one of volumes that has none throws
  }
}

/**
 * Whether a viewport has drawn its first image; until then it goes back to the slice that it began with.
 *
 * @param {any} viewport
 */
function hasDrawn(viewport) {
  return !isStack(viewport) || Boolean(viewport.getCornerstoneImage());
}

/**
 * Wait until OHIF shows a scan.
 *
 * @param {any} services
 * @param {Scan} scan
 * @param {() => boolean} isOver asked from time to time whether nobody waits any more
 * @returns {Promise<any>} the series as OHIF knows it; null where nobody waits any more
 */
export async function shown(services, scan, isOver) {
  const end = performance.now() + PATIENCE_MS;
  while (performance.now() < end) {
    if (isOver()) {
      return null;
    }
    const displaySets = services.displaySetService.getActiveDisplaySets();
    const found = displaySets.find((/** @type {any} */ set) => set.SeriesInstanceUID === scan.series);
    const viewports = viewportsOf(services, scan);
    if (found && viewports.length && viewports.every(({ viewport }) => hasDrawn(viewport))) {
      return found;
    }
    await new Promise(resolve => setTimeout(resolve, WAIT_MS));
  }
  throw new Error('The viewer does not show the scan; load the page again.');
}

/**
 * The viewport that is worked in: the active one, if it shows the scan.
 *
 * @param {any} services
 * @param {Scan} scan
 */
export function activeViewport(services, scan) {
  const all = viewportsOf(services, scan);
  const active = services.viewportGridService.getActiveViewportId();
  return (all.find(({ viewportId }) => viewportId === active) ?? all[0])?.viewport;
}

/**
 * Whether a viewport shows the slices as they are stored, and no plane that is reconstructed from them.
 *
 * @param {any} viewport
 */
export function isStack(viewport) {
  return viewport?.type === 'stack';
}

/**
 * The slice that is shown.
 *
 * @param {any} services
 * @param {Scan} scan
 */
export function currentInstance(services, scan) {
  const viewport = activeViewport(services, scan);
  const imageId = viewport?.getCurrentImageId?.();
  return imageId ? instanceOf(imageId) : null;
}

/**
 * Show a slice, in planes across it, too.
 *
 * @param {any} services
 * @param {Scan} scan
 * @param {string} instance
 */
export async function jumpTo(services, scan, instance) {
  for (const { viewport } of viewportsOf(services, scan)) {
    const imageIds = viewport.getImageIds();
    const imageId = imageIds.find((/** @type {string} */ id) => instanceOf(id) === instance);
    if (isStack(viewport)) {
      const index = imageIds.indexOf(imageId);
      await viewport.setImageIdIndex(index);
      // else OHIF 3.10 counts the wheel's next turn from the image before, and says "Loading..." once a mask is added
      viewport.targetImageIdIndex = index;
      viewport.render();
    } else if (imageId && viewport.jumpToWorld) {
      viewport.jumpToWorld(toWorld(imageId, (scan.columns - 1) / 2, (scan.rows - 1) / 2));
    }
  }
}

/**
 * Where a pixel lies, by the geometry in the image's header; the centre of the first one is 0, 0.
 *
 * @param {string} imageId
 * @param {number} column
 * @param {number} row
 * @returns {[number, number, number]} LPS millimetres
 */
export function toWorld(imageId, column, row) {
  const plane = window.cornerstone.metaData.get('imagePlaneModule', imageId);
  const { imagePositionPatient: first, rowCosines: across, columnCosines: down } = plane;
  const [x, y] = [column * plane.columnPixelSpacing, row * plane.rowPixelSpacing];
  return /** @type {[number, number, number]} */ ([0, 1, 2].map(i => first[i] + x * across[i] + y * down[i]));
}

/**
 * Where in an image a point lies, the other way round.
 *
 * @param {string} imageId
 * @param {[number, number, number]} point LPS millimetres
 * @returns {[number, number]} column and row; the centre of the first pixel is 0, 0
 */
export function toPixel(imageId, point) {
  const plane = window.cornerstone.metaData.get('imagePlaneModule', imageId);
  const { imagePositionPatient: first, rowCosines: across, columnCosines: down } = plane;
  const along = (/** @type {number[]} */ axis) => axis.reduce((sum, value, i) => sum + value * (point[i] - first[i]), 0);
  return [along(across) / plane.columnPixelSpacing, along(down) / plane.rowPixelSpacing];
}

/**
 * @param {any} services
 * @returns {any} the tool group that the viewports are in
 */
function toolGroup(services) {
  const { toolGroupService, viewportGridService } = services;
  const active = viewportGridService.getActiveViewportId();
  return toolGroupService.getToolGroupForViewport(active) ?? toolGroupService.getToolGroup('default');
}

/**
 * Take a tool into the hand.
 *
 * @param {any} services
 * @param {any} commandsManager
 * @param {keyof typeof TOOLS} tool
 */
export function takeTool(services, commandsManager, tool) {
  const group = toolGroup(services);
  const options = { toolName: TOOLS[tool], toolGroupIds: [group.id] };
  commandsManager.runCommand('setToolActiveToolbar', options);
}

/**
 * The tool that is in the hand; null for another than ours.
 *
 * @param {any} services
 * @returns {keyof typeof TOOLS | null}
 */
export function toolInHand(services) {
  const name = toolGroup(services)?.getActivePrimaryMouseButtonTool?.();
  return name === TOOLS.brush ? 'brush' : name === TOOLS.eraser ? 'eraser' : null;
}

/**
 * @param {any} services
 * @param {number} radius in millimetres
 */
export function setBrushSize(services, radius) {
  const group = toolGroup(services);
  if (group) {
    window.cornerstoneTools.utilities.segmentation.setBrushSizeForToolGroup(group.id, radius);
  }
}
