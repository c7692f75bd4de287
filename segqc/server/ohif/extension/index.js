/** The server whose extension this is, with a slash at its end: a hospital's own OHIF loads it from elsewhere. */
const SERVER = new URL('../../', import.meta.url);

const PANEL = 'segqc';

class SegqcPanel extends HTMLElement {
  connectedCallback() {
    this.textContent = `SegQC at ${SERVER.host}`;
    this.style.cssText = 'display: block; padding: 8px; color: white';
  }
}

customElements.get('segqc-panel') ?? customElements.define('segqc-panel', SegqcPanel);

/** OHIF's element for our own: made of one of the host's React, whatever its version. */
function panelComponent(extensionManager) {
  const { component } = extensionManager.getModuleEntry(
    '@ohif/extension-cornerstone.panelModule.activeViewportWindowLevel'
  );
  return () => ({ ...component({}), type: 'segqc-panel', key: null, ref: null, props: {} });
}

export default {
  id: 'segqc',
  routeName: 'segqc',
  displayName: 'SegQC',

  getPanelModule: ({ extensionManager }) => [
    { name: PANEL, label: 'SegQC', iconName: 'tab-segmentation', component: panelComponent(extensionManager) },
  ],

  async modeFactory({ loadModules }) {
    const [base] = await loadModules(['@ohif/mode-segmentation']);
    const mode = base.modeFactory({ modeConfiguration: {} });
    return {
      ...mode,
      id: 'segqc',
      routeName: 'segqc',
      displayName: 'SegQC',
      routes: mode.routes.map(route => ({
        ...route,
        layoutTemplate: context => {
          const layout = route.layoutTemplate(context);
          const [first, ...others] = layout.props.rightPanels;
          return {
            ...layout,
            props: { ...layout.props, rightPanels: [[`segqc.panelModule.${PANEL}`, first].flat(), ...others] },
          };
        },
      })),
    };
  },
};
