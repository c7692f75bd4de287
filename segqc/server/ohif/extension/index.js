/**
 * SegQC in OHIF: one module whose default export is both the extension and the mode.
 *
 * OHIF's own panels and tools are those of its segmentation mode. `app-config.js` names this file under `extensions`
 * and `modes`; see docs/ohif.md.
 */
import { ROUTE } from './ohif.js';
import { define, ELEMENT } from './panel.js';
import { ID, PANEL, Session } from './session.js';

const BASE = '@ohif/mode-segmentation';
const SOME_COMPONENT = '@ohif/extension-cornerstone.panelModule.activeViewportWindowLevel';

const session = new Session();
define(session);

/**
 * OHIF's element for our own: made of one of the host's React, whatever its version.
 *
 * @param {any} extensionManager
 */
function panelComponent(extensionManager) {
  const { component } = extensionManager.getModuleEntry(SOME_COMPONENT);
  return () => ({ ...component({}), type: ELEMENT, key: null, ref: null, props: {} });
}

export default {
  id: ID,
  routeName: ROUTE,
  displayName: 'SegQC',

  /** @param {any} managers */
  getPanelModule: ({ extensionManager }) => [
    { name: ID, label: 'SegQC', iconName: 'tab-roi-threshold', component: panelComponent(extensionManager) },
  ],

  /** @param {any} loaders */
  async modeFactory({ loadModules }) {
    const [base] = await loadModules([BASE]);
    const mode = base.modeFactory({ modeConfiguration: {} });
    return {
      ...mode,
      id: ID,
      routeName: ROUTE,
      displayName: 'SegQC',
      /** @param {any} context */
      onModeEnter(context) {
        mode.onModeEnter?.call(this, context);
        // OHIF 3.13 measures each structure a second after a stroke, and then writes all of them back as they were when it
        // began: a structure that is chosen meanwhile would not be the one that the brush paints.
        context.servicesManager.services.customizationService.setCustomizations?.({
          'panelSegmentation.disableUpdateSegmentationStats': { $set: true },
        });
        session.enter(context.servicesManager, context.commandsManager);
      },
      /** @param {any} context */
      onModeExit(context) {
        session.leave();
        mode.onModeExit?.call(this, context);
      },
      routes: mode.routes.map((/** @type {any} */ route) => ({
        ...route,
        layoutTemplate: (/** @type {any} */ context) => {
          const layout = route.layoutTemplate(context);
          const rightPanels = [PANEL, ...layout.props.rightPanels];
          const width = Math.max(320, layout.props.rightPanelInitialExpandedWidth ?? 0);
          return {
            ...layout,
            props: { ...layout.props, leftPanelClosed: true, rightPanels, rightPanelInitialExpandedWidth: width },
          };
        },
      })),
    };
  },
};
